"""Sums over one axis."""

import jax.numpy as jnp

from zamba2_jax.ops.placement import platform
from zamba2_jax.typing import Array


def sum_over(array: Array, axis: int) -> Array:
    """The sum over one axis, which goes."""
    # docs/xla-notes.md: sums-on-cpu
    if platform() != "cpu":
        return jnp.sum(array, axis)
    return jnp.tensordot(array, jnp.ones(array.shape[axis], array.dtype), (axis, 0), precision="highest")
