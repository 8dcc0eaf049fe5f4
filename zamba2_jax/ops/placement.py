"""Where a computation runs, as far as the choice of an implementation depends on it."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax

Tree = TypeVar("Tree")

HOPPER = ("H100", "H200")
"""In names of GPUs. On an H200 kernels were measured to be faster than XLA; an H100 has the same multiprocessors."""


def platform() -> str:
    """The platform of what is traced now: that of the mesh that is set, else JAX's default backend.

    So a program can be compiled for devices that are not there, by setting a mesh of them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def kernels(*, on_mesh: bool = False) -> Literal["tpu", "gpu"] | None:
    """Whose kernels are best for what is traced now: a TPU's, a Hopper GPU's, or none.

    None too unless it runs on one device, or apart on each: the compiler cannot divide a kernel among devices. With
    several of them only the inside of a `jax.shard_map` over all axes of the mesh is apart on each; for our scans and
    kernels it needs `check_vma=False`.

    Args:
        on_mesh: whether what is to run on a mesh that is set will run apart on each of its devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    apart_later = on_mesh and not mesh.empty and not mesh.manual_axes
    if not apart_later and not _undivided(without_mesh=jax.device_count() == 1):
        return None
    if platform() == "tpu":
        return "tpu"
    return "gpu" if platform() == "gpu" and any(name in _device_kind() for name in HOPPER) else None


def on_one_cpu() -> bool:
    """Whether what is traced now runs on a CPU, and no mesh that is set divides it."""
    return platform() == "cpu" and _undivided(without_mesh=True)


def compiled_apart(function: Callable[..., Tree], *arrays: Any) -> Tree:
    """function(*arrays), compiled apart from all around it on one CPU; elsewhere plain.

    So it is computed once, not in every reader; and what a backward pass computes again is not kept from before.
    """
    # docs/xla-notes.md: recomputed-by-readers
    if not on_one_cpu():
        return function(*arrays)
    return jax.lax.cond(jax.tree.leaves(arrays)[0].ravel()[0] == 0, function, function, *arrays)


def rounded(arrays: Tree) -> Tree:
    """The arrays, on a TPU rounded to their dtype before anything that follows is computed."""
    # docs/xla-notes.md: rounded-on-tpu
    return jax.lax.optimization_barrier(arrays) if platform() == "tpu" else arrays


def _undivided(*, without_mesh: bool) -> bool:
    """Whether what is traced now runs on one device, or apart on each; as told where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return without_mesh
    return mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)


def _device_kind() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind
