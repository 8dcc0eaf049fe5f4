"""RMS norms. Statistics and scale in at least float32, the result in the dtype of the input."""

import jax
import jax.numpy as jnp

from zamba2_jax.typing import Array, Float, at_least_fp32


def rms_norm(x: Float[Array, "*batch d"], scale: Float[Array, " d"], eps: float) -> Float[Array, "*batch d"]:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis."""
    return (_normalize(x.astype(at_least_fp32(x.dtype)), eps) * scale).astype(x.dtype)


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


def _normalize(x: Float[Array, "*batch d"], eps: float) -> Float[Array, "*batch d"]:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
