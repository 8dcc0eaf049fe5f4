"""Rotary position embedding (arXiv:2104.09864), half-split form."""

import jax
import jax.numpy as jnp
import numpy as np

from zamba2_jax.ops.placement import compiled_apart
from zamba2_jax.typing import Array, Float, Int, at_least_fp32


def rotate(
    x: Float[Array, "b t h p"],
    positions: Int[Array, "b t"],
    base: float | tuple[float, ...],
    *,
    custom_gradient: bool = True,
) -> Float[Array, "b t h p"]:
    """Rotates the pairs (x_i, x_{i + p/2}) of every head by positions * base^(-2i / p).

    Args:
        x: queries or keys; p is even.
        positions: in tokens, any offset: scores of rotated q and k depend on differences only.
        base: theta, larger in models of long contexts; or, where a model scales its frequencies, those of the p/2
            pairs in place of base^(-2i / p).
        custom_gradient: whether the gradient is ours, for reverse mode once, or JAX's.
    """
    half, wide = x.shape[-1] // 2, at_least_fp32(x.dtype)
    frequencies = base if isinstance(base, tuple) else base ** (-np.arange(half) / half)

    def table(positions: Array) -> tuple[Array, Array]:
        angle = (positions[..., None].astype(wide) * jnp.asarray(frequencies, wide))[:, :, None, None]
        return jnp.cos(angle), jnp.concatenate([-jnp.sin(angle), jnp.sin(angle)], axis=-2)

    cos, sin = compiled_apart(table, positions)
    turn = _turn if custom_gradient else _turned
    return turn(x.reshape(*x.shape[:-1], 2, half), cos, sin).reshape(x.shape)


def _turned(pairs: Array, cos: Array, sin: Array) -> Array:
    # docs/xla-notes.md: halves-of-a-rotation
    wide = pairs.astype(cos.dtype)
    return (wide * cos + jnp.flip(wide, -2) * sin).astype(pairs.dtype)


_turn = jax.custom_vjp(_turned)
# Back is to turn the other way. docs/xla-notes.md: halves-of-a-rotation
_turn.defvjp(
    lambda pairs, cos, sin: (_turn(pairs, cos, sin), (cos, sin)),
    lambda tables, cotangent: (_turn(cotangent, tables[0], -tables[1]), None, None),
)
