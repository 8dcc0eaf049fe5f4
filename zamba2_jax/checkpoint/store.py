"""Training checkpoints: any pytree of arrays, with Orbax."""

import os
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

Tree = TypeVar("Tree")


def save_state(directory: str | os.PathLike[str], state: object) -> None:
    """Writes every array of a pytree, a training state for one. Returns when it is on disk.

    The directory appears whole or not at all.

    Args:
        directory: must not exist.
        state: a pytree of arrays; modules of flax.nnx may be in it.

    Raises:
        FileExistsError: the directory exists.
    """
    path = Path(directory).resolve()
    if path.exists():
        raise FileExistsError(f"{path} exists, expected a new directory for the checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, _named_arrays(state))


def restore_state(directory: str | os.PathLike[str], like: Tree) -> Tree:
    """Reads back what `save_state` wrote, bit for bit.

    Args:
        directory: the checkpoint.
        like: a pytree of the same structure, shapes and dtypes, of arrays or of `jax.ShapeDtypeStruct`; its arrays'
            shardings say where the new arrays go, the default device where it has none.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint holds other arrays; all differences are listed.
    """
    path = Path(directory).resolve()
    target = {name: _abstract(array) for name, array in _named_arrays(like).items()}
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(path).item_metadata if path.is_dir() else None
        if stored is None:
            raise FileNotFoundError(f"no checkpoint at {path}")
        differences = _differences({name: (stored[name].shape, stored[name].dtype) for name in stored}, target)
        if differences:
            listed = "\n  ".join(differences)
            raise ValueError(f"the checkpoint at {path} is of another state:\n  {listed}")
        arrays = checkpointer.restore(path, target)
    leaves, structure = jax.tree.flatten(like)
    return jax.tree.unflatten(structure, [arrays[name] for name, _ in zip(target, leaves, strict=True)])


def _named_arrays(tree: object) -> dict[str, jax.Array | jax.ShapeDtypeStruct]:
    """Every array of a pytree by its path, in the order of its leaves."""
    leaves, _ = jax.tree.flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    named = {}
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        named[name] = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
    return named


def _abstract(array: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = array.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _differences(
    stored: dict[str, tuple[tuple[int, ...], jnp.dtype]], target: dict[str, jax.ShapeDtypeStruct]
) -> list[str]:
    lines = [f"{name}: missing in the checkpoint" for name in target if name not in stored]
    lines += [f"{name}: in the checkpoint only" for name in stored if name not in target]
    for name, array in target.items():
        if name in stored and stored[name] != (array.shape, array.dtype):
            shape, dtype = stored[name]
            lines.append(f"{name}: {dtype}{list(shape)} in the checkpoint, expected {array.dtype}{list(array.shape)}")
    return lines
