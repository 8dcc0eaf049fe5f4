"""Where a computation runs, as far as the choice of an implementation depends on it."""

import jax


def is_undivided() -> bool:
    """Whether what is traced now runs on one device, or apart on each: the compiler cannot divide a kernel among them.

    With several devices that is only so inside of a `jax.shard_map` over all axes of the mesh, which for our scans and
    kernels needs `check_vma=False`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() == 1 or (not mesh.empty and set(mesh.manual_axes) == set(mesh.axis_names))
