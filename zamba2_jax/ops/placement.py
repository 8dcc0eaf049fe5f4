"""Where a computation runs, as far as the choice of an implementation depends on it."""

import jax


def platform() -> str:
    """The platform of what is traced now: that of the mesh that is set, else JAX's default backend.

    So a program can be compiled for devices that are not there, by setting a mesh of them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def takes_tpu_kernels() -> bool:
    """Whether what is traced now runs on a TPU, and on one device or apart on each.

    The compiler cannot divide a kernel among devices. With several of them only the inside of a `jax.shard_map` over
    all axes of the mesh is apart on each; for our scans and kernels it needs `check_vma=False`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        undivided = jax.device_count() == 1
    else:
        undivided = mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)
    return platform() == "tpu" and undivided
