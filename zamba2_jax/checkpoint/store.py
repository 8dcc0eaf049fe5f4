"""Training checkpoints: any pytree of arrays, with Orbax."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
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
        checkpointer.save(path, named_arrays(state))


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
    target = abstract_arrays(like)
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(path).item_metadata if path.is_dir() else None
        if stored is None:
            raise FileNotFoundError(f"no checkpoint at {path}")
        check_stored(stored, target, path)
        arrays = checkpointer.restore(path, target)
    return with_arrays(like, arrays)


def named_arrays(tree: object) -> dict[str, jax.Array | jax.ShapeDtypeStruct]:
    """Every array of a pytree by its path, in the order of its leaves."""
    leaves, _ = jax.tree.flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    named = {}
    for path, leaf in leaves:
        if not jax.tree.leaves(leaf):  # a parameter for which the state of an optimizer holds nothing
            continue
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        named[name] = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
    return named


def with_arrays(like: Tree, arrays: Mapping[str, jax.Array]) -> Tree:
    """The pytree with the arrays that `named_arrays` would name so in it."""
    leaves, structure = jax.tree.flatten(like)
    return jax.tree.unflatten(structure, [arrays[name] for name, _ in zip(named_arrays(like), leaves, strict=True)])


def abstract_arrays(tree: object) -> dict[str, jax.ShapeDtypeStruct]:
    """Every array's shape, dtype and sharding by its path; the default device where it has no sharding."""
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding or default)
        for name, array in named_arrays(tree).items()
    }


def check_stored(stored: Mapping[str, Any], target: Mapping[str, jax.ShapeDtypeStruct], path: Path | str) -> None:
    """Whether a checkpoint holds the arrays that are wanted.

    Args:
        stored: what has a shape and a dtype, by the path of each array in the checkpoint.
        target: the arrays wanted.
        path: of the checkpoint, for the message.

    Raises:
        ValueError: it holds other arrays; all differences are listed.
    """
    lines = [f"{name}: missing in the checkpoint" for name in target if name not in stored]
    lines += [f"{name}: in the checkpoint only" for name in stored if name not in target]
    for name, array in target.items():
        if name in stored and (stored[name].shape, stored[name].dtype) != (array.shape, array.dtype):
            shape, dtype = stored[name].shape, stored[name].dtype
            lines.append(f"{name}: {dtype}{list(shape)} in the checkpoint, expected {array.dtype}{list(array.shape)}")
    if lines:
        listed = "\n  ".join(lines)
        raise ValueError(f"the checkpoint at {path} is of another state:\n  {listed}")
