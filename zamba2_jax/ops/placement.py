"""Where a computation runs, as far as the choice of an implementation depends on it."""

from typing import Literal

import jax

HOPPER = ("H100", "H200")
"""In names of GPUs. On an H200 kernels were measured to be faster than XLA; an H100 has the same multiprocessors."""


def platform() -> str:
    """The platform of what is traced now: that of the mesh that is set, else JAX's default backend.

    So a program can be compiled for devices that are not there, by setting a mesh of them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def kernels() -> Literal["tpu", "gpu"] | None:
    """Whose kernels are best for what is traced now: a TPU's, a Hopper GPU's, or none.

    None too unless it runs on one device, or apart on each: the compiler cannot divide a kernel among devices. With
    several of them only the inside of a `jax.shard_map` over all axes of the mesh is apart on each; for our scans and
    kernels it needs `check_vma=False`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        undivided = jax.device_count() == 1
    else:
        undivided = mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)
    if not undivided:
        return None
    if platform() == "tpu":
        return "tpu"
    return "gpu" if platform() == "gpu" and any(name in _device_kind() for name in HOPPER) else None


def _device_kind() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind
