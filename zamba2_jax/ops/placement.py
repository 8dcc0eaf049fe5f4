"""Where a computation runs, as far as the choice of an implementation depends on it."""

import jax


def takes_tpu_kernels() -> bool:
    """Whether what is traced now runs on a TPU, and on one device or apart on each.

    The compiler cannot divide a kernel among devices. With several of them only the inside of a `jax.shard_map` over
    all axes of the mesh is apart on each; for our scans and kernels it needs `check_vma=False`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    undivided = jax.device_count() == 1 or (not mesh.empty and set(mesh.manual_axes) == set(mesh.axis_names))
    return jax.default_backend() == "tpu" and undivided
