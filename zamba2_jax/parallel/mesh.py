"""Where arrays live: the mesh, and the one table from logical axes, of parameters and activations, to its axes.

The mesh is the one that `jax.set_mesh` sets. Without one, or with one of a single device, all functions of this module
that take no mesh leave everything as it is.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar, cast

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from zamba2_jax.typing import Array


class _HasConfig(Protocol):
    @property
    def config(self) -> "Dimensions":
        """Of the model."""


MESH_AXES = ("data", "fsdp", "tensor", "sequence")

# Logical axis -> mesh axes. An axis that is not named here, or is None, is replicated.
RULES = {
    # of parameters
    "d_model": ("fsdp",),
    "attention_in": ("fsdp",),
    "adapter_out": ("tensor", "fsdp"),
    "channels": ("tensor", "fsdp"),
    # of both
    "vocab": ("tensor",),
    "inner": ("tensor",),
    "heads": ("tensor",),
    "attention_heads": ("tensor",),
    "ffn": ("tensor",),
    # of activations
    "batch": ("data", "fsdp"),
    "time": ("sequence",),
}

Axes = tuple[str | None, ...]
Tree = TypeVar("Tree")
Result = TypeVar("Result")
ModelT = TypeVar("ModelT", bound=_HasConfig)


class Dimensions(Protocol):
    """What says which dimensions a mesh has to divide; see `nn.config.ModelConfig.mesh_sizes`."""

    def mesh_sizes(self) -> Mapping[tuple[str, str], int]:
        """The size by logical axis and name for people."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSizes:
    """The sizes of the mesh's axes."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1) -> Mesh:
    """A mesh over the first data * fsdp * tensor * sequence devices, for `jax.set_mesh` and `shard_model`.

    Raises:
        ValueError: there are fewer devices, or a size is below 1.
    """
    sizes = (data, fsdp, tensor, sequence)
    wanted, devices = math.prod(sizes), jax.devices()
    if min(sizes) < 1 or wanted > len(devices):
        asked = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        raise ValueError(f"mesh {asked} needs {wanted} devices, all sizes >= 1; {len(devices)} are there")
    return _mesh(sizes, devices[:wanted])


def local_mesh(platform: str | None = None, *, fsdp: int = 1) -> Mesh:
    """A mesh over the first devices of this process, of several perhaps; by default of JAX's default platform.

    Raises:
        ValueError: there are fewer devices.
        RuntimeError: JAX has no such platform.
    """
    devices = jax.local_devices(backend=platform)
    if fsdp > len(devices):
        raise ValueError(f"mesh fsdp={fsdp} of this process alone: {len(devices)} devices are there")
    return _mesh((1, fsdp, 1, 1), devices[:fsdp])


def _mesh(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> Mesh:
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)


def check_mesh(
    config: Dimensions, mesh: Mesh | AbstractMesh, *, batch: int | None = None, length: int | None = None
) -> None:
    """Whether a model fits a mesh; with batch and length, in rows and tokens, whether a full pass over them does.

    Raises:
        ValueError: the mesh does not divide a dimension; all such dimensions are named.
    """
    sizes = {**config.mesh_sizes(), ("batch", "batch"): batch, ("time", "length"): length}
    problems = [
        f"{_named(axis, mesh)} does not divide the {name}, {size}"
        for (axis, name), size in sizes.items()
        if size is not None and size % parts(axis, mesh)
    ]
    if problems:
        raise ValueError("; ".join(problems))


def parameter_sharding(parameter: nnx.Param, mesh: Mesh) -> NamedSharding:
    """The sharding of one parameter, from the `axes` it was declared with.

    Raises:
        ValueError: a mesh axis does not divide the dimension it splits.
    """
    return NamedSharding(mesh, _checked_spec(parameter.shape, parameter.axes, mesh))


def shard_model(model: ModelT, mesh: Mesh) -> ModelT:
    """The model with every parameter placed on the mesh.

    Raises:
        ValueError: as in `check_mesh`.
    """
    check_mesh(model.config, mesh)
    return _map_parameters(lambda array, parameter: jax.device_put(array, parameter_sharding(parameter, mesh)), model)


def abstract_on_mesh(tree: Tree, mesh: Mesh) -> Tree:
    """Shapes, as of `jax.eval_shape`, with their places on the mesh: parameters have theirs, all else is everywhere.

    Raises:
        ValueError: as in `parameter_sharding`.
    """

    def placed(leaf):
        if _is_masked(leaf):
            return leaf
        if isinstance(leaf, nnx.Param):
            return leaf.replace(_abstract(leaf, parameter_sharding(leaf, mesh)))
        return _abstract(leaf, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(placed, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where the rows of a batch are, [b, t]."""
    return NamedSharding(mesh, _spec(("batch", "time")))


def constrain_parameters(tree: Tree) -> Tree:
    """Every parameter in a pytree, such as a gradient or the state of an optimizer, where the mesh has its like."""
    return _map_parameters(lambda array, parameter: constrain(array, *parameter.axes), tree)


def gather_parameters(tree: Tree) -> Tree:
    """Every parameter in a pytree made whole along `fsdp`, for use; gradients are where `constrain_parameters` says."""
    # docs/xla-notes.md: gathered-weights
    return _map_parameters(lambda array, parameter: _gather(array, parameter.axes), tree)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(array: Array, axes: Axes) -> Array:
    return array if ambient_mesh() is None else jax.lax.with_sharding_constraint(array, _spec(axes, without="fsdp"))


_gather.defvjp(
    lambda array, axes: (_gather(array, axes), None),
    # Whole at first. docs/xla-notes.md: gathered-weights
    lambda axes, _, cotangent: (constrain(_gather(cotangent, axes), *axes),),
)


def ambient_mesh() -> AbstractMesh | None:
    """The mesh that computations are to be divided over; None where there is one device, or we run apart on each.

    Raises:
        ValueError: the mesh that is set is not one of `make_mesh`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return None
    if set(mesh.axis_names) != set(MESH_AXES) or set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(f"mesh {mesh} is set: expected the axes {', '.join(MESH_AXES)}, all Auto, as of make_mesh")
    return mesh


def constrain(array: Array, *axes: str | None) -> Array:
    """The array, divided over the mesh by the logical axes of its dimensions, None for those that are not.

    Raises:
        ValueError: the mesh does not divide a dimension.
    """
    mesh = ambient_mesh()
    return array if mesh is None else jax.lax.with_sharding_constraint(array, _checked_spec(array.shape, axes, mesh))


def per_device(
    function: Callable[..., Result], in_axes: Sequence[Axes], out_axes: Axes | Sequence[Axes]
) -> Callable[..., Result]:
    """A function that every device runs on its own part of the arrays.

    Kernels have to be called this way (docs/xla-notes.md: rows-alone).

    Args:
        function: of arrays, or None in the place of any.
        in_axes: logical axes of the dimensions of each argument.
        out_axes: those of the result, or in a list those of each.

    Raises:
        ValueError: by the function returned: the mesh does not divide a dimension.
    """
    mesh = ambient_mesh()
    if mesh is None:
        return function

    def divided(*arrays: Array | None) -> Result:
        specs = [
            PartitionSpec() if array is None else _checked_spec(array.shape, axes, mesh)
            for array, axes in zip(arrays, in_axes, strict=True)
        ]
        out = tuple(map(_spec, out_axes)) if isinstance(out_axes, list) else _spec(cast(Axes, out_axes))
        return jax.shard_map(function, in_specs=tuple(specs), out_specs=out, check_vma=False)(*arrays)

    return divided


def row_shares() -> int:
    """Into how many shares `summed_over_rows` divides the rows of a batch: as many as devices, or 1."""
    mesh = ambient_mesh()
    return mesh.size if mesh is not None and mesh.shape["data"] == mesh.size else 1


def summed_over_rows(function: Callable[..., Result]) -> Callable[..., Result]:
    """A sum over rows of a batch, of which every device computes its rows' share, as if it were the only device.

    On a mesh of `data` alone; elsewhere the function as it is. What is summed crosses the network once, whatever loops
    are in the function (docs/xla-notes.md: rows-alone).

    Args:
        function: of a model, a batch with the rows in front, and a number.
    """
    if row_shares() == 1:
        return function

    def of_rows(model: Tree, batch: Tree, number: Array) -> Result:
        return jax.lax.psum(function(model, batch, number), "data")

    whole = PartitionSpec()
    return jax.shard_map(of_rows, in_specs=(whole, PartitionSpec("data"), whole), out_specs=whole, check_vma=False)


def split_axis(axis: str | None) -> str | None:
    """The one mesh axis that a logical axis is divided over now, for collectives; None if it is not."""
    mesh = ambient_mesh()
    return None if axis is None or mesh is None or parts(axis, mesh) == 1 else RULES[axis][0]


def parts(axis: str | None, mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the mesh divides a logical axis."""
    return math.prod(mesh.shape[name] for name in _mesh_axes(axis))


def _abstract(like: jax.ShapeDtypeStruct | nnx.Param, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)


def _map_parameters(function: Callable[[Array, nnx.Param], Array], tree: Tree) -> Tree:
    def place(leaf):
        if not isinstance(leaf, nnx.Param) or _is_masked(leaf):
            return leaf
        return leaf.replace(function(leaf.get_value(), leaf))

    return jax.tree.map(place, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))


def _is_masked(leaf: object) -> bool:
    """Whether it is a parameter without an array, as optax leaves where a state has none for it."""
    return isinstance(leaf, nnx.Param) and not jax.tree.leaves(leaf)


def _mesh_axes(axis: str | None) -> tuple[str, ...]:
    return RULES.get(axis, ()) if axis is not None else ()


def _spec(axes: Axes, without: str | None = None) -> PartitionSpec:
    entries = [tuple(name for name in _mesh_axes(axis) if name != without) for axis in axes]
    return PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in entries))


def _checked_spec(shape: tuple[int, ...], axes: Axes, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    for size, axis in zip(shape, axes, strict=True):
        if size % parts(axis, mesh):
            raise ValueError(
                f"{_named(axis, mesh)} does not divide {axis!r} of size {size} "
                f"in an array of shape {shape} with axes {axes}"
            )
    return _spec(axes)


def _named(axis: str | None, mesh: Mesh | AbstractMesh) -> str:
    """The mesh axes of a logical axis, and their sizes."""
    return "mesh " + ", ".join(f"{name}={mesh.shape[name]}" for name in _mesh_axes(axis))


def bytes_per_device(tree: object) -> int:
    """Bytes of the arrays of a tree, or of their shapes with their shardings, on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
