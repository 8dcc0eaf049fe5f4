"""Rotary position embedding (arXiv:2104.09864), half-split form."""

import jax.numpy as jnp
import numpy as np

from zamba2_jax.typing import Array, Float, Int, at_least_fp32


def rotate(x: Float[Array, "b t h p"], positions: Int[Array, "b t"], base: float) -> Float[Array, "b t h p"]:
    """Rotates the pairs (x_i, x_{i + p/2}) of every head by positions * base^(-2i / p).

    Args:
        x: queries or keys; p is even.
        positions: in tokens, any offset: scores of rotated q and k depend on differences only.
        base: theta; 10000 by default in the published models, larger in the long-context ones.
    """
    half = x.shape[-1] // 2
    wide = at_least_fp32(x.dtype)
    frequency = jnp.asarray(base ** (-np.arange(half) / half), wide)
    angle = (positions[..., None].astype(wide) * frequency)[:, :, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(wide), x[..., half:].astype(wide)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
