"""Matrix products with a weight: the dense layer and the low-rank adapter.

At matmul precision "highest" (`jax.default_matmul_precision`) long sums of float32 are taken in blocks. On CPU, XLA's
product rounds 1.6 times as badly as the MKL of PyTorch, because it adds up more terms in a row; in blocks of 128 it is
the more exact of the two and takes a tenth longer.

XLA's CPU product of bfloat16 is fast, 1.5 to 2 times as fast as that of float32, where its result is float32 and there
are two rows at least; else it is slower than that of float32, for one row nine times.
"""

import jax
import jax.numpy as jnp

from zamba2_jax.ops.placement import platform
from zamba2_jax.typing import Array, DTypeLike, Float

BLOCK = 128
"""Terms of a sum that are added up in a row at precision "highest"."""


def matmul(
    x: Float[Array, "*batch i"], w: Float[Array, "i o"], *, dtype: DTypeLike | None = None
) -> Float[Array, "*batch o"]:
    """x @ w, accumulated in at least float32 and rounded once to `dtype`, which is that of x by default."""
    dtype = jnp.dtype(dtype or x.dtype)
    highest = jax.config.jax_default_matmul_precision == "highest"  # type: ignore[attr-defined]
    if highest and x.dtype == w.dtype == dtype == jnp.float32:
        return _blocked(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], -1)
    if x.dtype == w.dtype == jnp.bfloat16 and platform() == "cpu":
        return _bfloat16_on_cpu(x.reshape(-1, x.shape[-1]), w).astype(dtype).reshape(*x.shape[:-1], -1)
    return jnp.matmul(x, w, preferred_element_type=dtype)


def _bfloat16_on_cpu(x: Float[Array, "m i"], w: Float[Array, "i o"]) -> Float[Array, "m o"]:
    """x @ w in the form that is fast, in float32."""
    rows = x.shape[0]
    if rows == 1:
        x = jnp.pad(x, ((0, 1), (0, 0)))
    return jnp.matmul(x, w, preferred_element_type=jnp.float32)[:rows]


@jax.custom_vjp
def _blocked(x: Float[Array, "m i"], w: Float[Array, "i o"]) -> Float[Array, "m o"]:
    """x @ w, summed over blocks of the inner axis one after the other."""
    if x.shape[1] <= BLOCK:
        return x @ w
    padding = -x.shape[1] % BLOCK
    x = jnp.pad(x, ((0, 0), (0, padding))).reshape(x.shape[0], -1, BLOCK).swapaxes(0, 1)
    w = jnp.pad(w, ((0, padding), (0, 0))).reshape(-1, BLOCK, w.shape[1])
    total = jnp.zeros((x.shape[1], w.shape[2]), x.dtype)
    return jax.lax.scan(lambda total, block: (total + block[0] @ block[1], None), total, (x, w))[0]


def _blocked_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _blocked(x, w), (x, w)


def _blocked_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, w = saved
    return _blocked(cotangent, w.T), _blocked(x.T, cotangent)


_blocked.defvjp(_blocked_forward, _blocked_backward)


def linear(
    x: Float[Array, "*batch i"],
    w: Float[Array, "i o"],
    bias: Float[Array, " o"] | None = None,
    *,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*batch o"]:
    """x @ w + bias. The result has `dtype`, which is that of x by default, and is rounded to it once."""
    dtype = jnp.dtype(dtype or x.dtype)
    if bias is None:
        return matmul(x, w, dtype=dtype)
    return (matmul(x, w, dtype=jnp.promote_types(dtype, bias.dtype)) + bias).astype(dtype)


def adapter(x: Float[Array, "*batch i"], a: Float[Array, "i a"], b: Float[Array, "a o"]) -> Float[Array, "*batch o"]:
    """The low-rank term x a b that one call of a shared block adds to a projection (arXiv:2411.15242, section 2.2).

    There is no scale: these adapters are part of the pretrained model.
    """
    return linear(linear(x, a), b)
