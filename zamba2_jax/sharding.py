"""Where arrays live: the mesh, and the one table from the logical axes of parameters to its axes."""

import math

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

# Logical axis of a parameter -> mesh axis. An axis that is not named here, or is None, is replicated.
RULES = {
    "d_model": "fsdp",
    "attention_in": "fsdp",
    "vocab": "tensor",
    "inner": "tensor",
    "heads": "tensor",
    "attention_heads": "tensor",
    "ffn": "tensor",
}


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1) -> Mesh:
    """A mesh over the first data * fsdp * tensor * sequence devices.

    Raises:
        ValueError: there are fewer devices, or a size is below 1.
    """
    sizes = (data, fsdp, tensor, sequence)
    wanted, devices = math.prod(sizes), jax.devices()
    if min(sizes) < 1 or wanted > len(devices):
        asked = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        raise ValueError(f"mesh {asked} needs {wanted} devices, all sizes >= 1; {len(devices)} are there")
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=devices[:wanted])


def parameter_sharding(parameter: nnx.Param, mesh: Mesh) -> NamedSharding:
    """The sharding of one parameter, from the `axes` it was declared with.

    Raises:
        ValueError: a mesh axis does not divide the dimension it splits.
    """
    axes = tuple(RULES.get(axis) if axis else None for axis in parameter.axes)
    for size, logical, axis in zip(parameter.shape, parameter.axes, axes, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"mesh axis {axis!r} of size {mesh.shape[axis]} does not divide {logical!r} of size {size} "
                f"in a parameter of shape {parameter.shape} with axes {parameter.axes}"
            )
    return NamedSharding(mesh, PartitionSpec(*axes))


def shard_model(model: nnx.Module, mesh: Mesh) -> nnx.Module:
    """The model with every parameter placed on the mesh.

    Raises:
        ValueError: as in `parameter_sharding`.
    """
    return jax.tree.map(
        lambda parameter: parameter.replace(jax.device_put(parameter[...], parameter_sharding(parameter, mesh))),
        model,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Param),
    )
