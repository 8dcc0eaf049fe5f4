"""RMS norms. Statistics and scale in at least float32, the result in the dtype of the input.

With `custom_gradient` they are differentiable once, in reverse; without, as often as wanted, in any mode.
"""

from functools import partial

import jax
import jax.numpy as jnp

from zamba2_jax.ops.placement import platform
from zamba2_jax.ops.sums import sum_over
from zamba2_jax.typing import Array, Float, at_least_fp32


def rms_norm(
    x: Float[Array, "*batch d"], scale: Float[Array, "*#batch d"], eps: float, *, custom_gradient: bool = True
) -> Float[Array, "*batch d"]:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis."""
    wide = x.astype(at_least_fp32(x.dtype))
    normed = _normalize(wide, eps) if custom_gradient else wide * inverse_rms(wide, eps)
    return (normed * scale).astype(x.dtype)


def inverse_rms(x: Float[Array, "*batch d"], eps: float) -> Float[Array, "*batch 1"]:
    """1 / sqrt(mean(x^2) + eps) over the last axis, in at least float32."""
    x = x.astype(at_least_fp32(x.dtype))
    return jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def gated_rms_norm(
    x: Float[Array, "*batch e"],
    z: Float[Array, "*batch e"],
    scale: Float[Array, " e"],
    ngroups: int,
    eps: float,
    *,
    custom_gradient: bool = True,
) -> Float[Array, "*batch e"]:
    """Gates x with silu(z), then norms each of `ngroups` equal slices of the last axis on its own, then scales.

    This is Mamba2's norm with `norm_before_gate=False` (arXiv:2405.21060, section 7.1).
    """
    return _gated(x, z, scale, ngroups, eps) if custom_gradient else _gated_forward(x, z, scale, ngroups, eps)[0]


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


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _gated(x: Array, z: Array, scale: Array, ngroups: int, eps: float) -> Array:
    return _gated_forward(x, z, scale, ngroups, eps)[0]


def _gated_forward(x: Array, z: Array, scale: Array, ngroups: int, eps: float) -> tuple[Array, tuple[Array, ...]]:
    wide = at_least_fp32(x.dtype)
    gated = x.astype(wide) * jax.nn.silu(z.astype(wide))
    inverse = jax.lax.rsqrt(_group_means(gated * gated, ngroups) + eps)
    return (gated * _of_groups(inverse, gated.shape[-1]) * scale).astype(x.dtype), (x, z, scale, inverse)


def _gated_backward(ngroups: int, eps: float, saved: tuple[Array, ...], cotangent: Array) -> tuple[Array, ...]:
    x, z, scale, inverse = saved
    wide_x, wide_z, cotangent = (array.astype(inverse.dtype) for array in (x, z, cotangent))
    sigmoid, d_normed = jax.nn.sigmoid(wide_z), cotangent * scale
    silu = wide_z * sigmoid
    gated, factor = wide_x * silu, _of_groups(inverse, len(scale))
    means = _group_means(d_normed * gated, ngroups)
    d_gated = factor * d_normed - _of_groups(inverse**3 * means, len(scale)) * gated
    d_z = d_gated * wide_x * (sigmoid + silu * (1 - sigmoid))
    d_scale = jnp.sum(cotangent * gated * factor, range(x.ndim - 1))
    return (d_gated * silu).astype(x.dtype), d_z.astype(z.dtype), d_scale.astype(scale.dtype)


_gated.defvjp(_gated_forward, _gated_backward)


def _group_means(x: Float[Array, "*batch e"], ngroups: int) -> Float[Array, "*batch g"]:
    """The mean of each of `ngroups` equal slices of the last axis."""
    # docs/xla-notes.md: split-axis-on-tpu
    size = x.shape[-1] // ngroups
    if platform() != "tpu":
        return sum_over(x.reshape(*x.shape[:-1], ngroups, size), -1) / size
    group = jnp.arange(x.shape[-1]) // size
    return jnp.stack([jnp.sum(jnp.where(group == i, x, 0), -1) for i in range(ngroups)], -1) / size


def _of_groups(values: Float[Array, "*batch g"], width: int) -> Float[Array, "*batch e"]:
    """For each of `width` channels in equal groups the value of its group."""
    # docs/xla-notes.md: split-axis-on-tpu
    ngroups = values.shape[-1]
    if platform() != "tpu":
        return jnp.repeat(values, width // ngroups, axis=-1)
    group, result = jnp.arange(width) // (width // ngroups), values[..., :1]
    for i in range(1, ngroups):
        result = jnp.where(group >= i, values[..., i : i + 1], result)
    return result
