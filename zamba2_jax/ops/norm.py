"""RMS norms. Statistics and scale in at least float32, the result in the dtype of the input.

Differentiable once, in reverse.
"""

from functools import partial

import jax
import jax.numpy as jnp

from zamba2_jax.ops.sums import sum_over
from zamba2_jax.typing import Array, Float, at_least_fp32


def rms_norm(x: Float[Array, "*batch d"], scale: Float[Array, " d"], eps: float) -> Float[Array, "*batch d"]:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis."""
    return (_normalize(x.astype(at_least_fp32(x.dtype)), eps) * scale).astype(x.dtype)


def inverse_rms(x: Float[Array, "*batch d"], eps: float) -> Float[Array, "*batch 1"]:
    """1 / sqrt(mean(x^2) + eps) over the last axis, in at least float32."""
    x = x.astype(at_least_fp32(x.dtype))
    return jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def gated_rms_norm(
    x: Float[Array, "*batch e"], z: Float[Array, "*batch e"], scale: Float[Array, " e"], ngroups: int, eps: float
) -> Float[Array, "*batch e"]:
    """Gates x with silu(z), then norms each of `ngroups` equal slices of the last axis on its own, then scales.

    This is Mamba2's norm with `norm_before_gate=False` (arXiv:2405.21060, section 7.1).
    """
    wide = at_least_fp32(x.dtype)
    gated = x.astype(wide) * jax.nn.silu(z.astype(wide))
    groups = gated.reshape(*x.shape[:-1], ngroups, -1)
    return (_normalize(groups, eps).reshape(x.shape) * scale).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _normalize(x: Float[Array, "*batch d"], eps: float) -> Float[Array, "*batch d"]:
    return _forward(x, eps)[0]


def _forward(x: Array, eps: float) -> tuple[Array, tuple[Array, Array]]:
    inverse = inverse_rms(x, eps)
    return x * inverse, (x, inverse)


def _backward(eps: float, saved: tuple[Array, Array], cotangent: Array) -> tuple[Array]:
    x, inverse = saved
    mean = sum_over(cotangent * x, -1)[..., None] / x.shape[-1]
    return (inverse * cotangent - inverse**3 * mean * x,)


_normalize.defvjp(_forward, _backward)
