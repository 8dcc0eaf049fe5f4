"""Matrix products with a weight.

Weights are held by outputs, [out, in], as published checkpoints hold them. At matmul precision "highest"
(`jax.default_matmul_precision`) long sums of float32 are taken in blocks.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from zamba2_jax.ops.placement import on_one_cpu, platform
from zamba2_jax.typing import Array, DTypeLike, Float

BLOCK = 128
"""Terms of a sum that are added up in a row at precision "highest". docs/xla-notes.md: blocked-sums"""
FEW_ROWS = 128
"""Rows of float32 up to which a weight is on the left of its product on CPU. docs/xla-notes.md: weight-on-the-left"""

Axes = tuple[int, ...]


def linear(
    x: Float[Array, "*batch i"],
    w: Float[Array, "o i"],
    bias: Float[Array, " o"] | None = None,
    *,
    dtype: DTypeLike | None = None,
    custom_gradient: bool = True,
) -> Float[Array, "*batch o"]:
    """x @ w.T + bias, accumulated in at least float32 and rounded once to `dtype`, which is that of x by default.

    With `custom_gradient` differentiable in reverse: the gradient of w is one product, as w lies in memory. JAX's own
    has every mode.
    """
    dtype, product = jnp.dtype(dtype or x.dtype), _linear if custom_gradient else _rows_by_weight
    if bias is None:
        return product(x, w, dtype)
    return (product(x, w, jnp.promote_types(dtype, bias.dtype)) + bias).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x: Array, w: Array, dtype: jnp.dtype) -> Array:
    return _rows_by_weight(x, w, dtype)


def _forward(x: Array, w: Array, dtype: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    # docs/xla-notes.md: policies-and-custom-gradients
    return _rows_by_weight(x, w, dtype), (x, w)


def _rows_by_weight(x: Array, w: Array, dtype: jnp.dtype) -> Array:
    rows = math.prod(x.shape[:-1])
    if 1 < rows <= FEW_ROWS and x.dtype == jnp.float32 and on_one_cpu() and not _at_highest():
        # docs/xla-notes.md: weight-on-the-left
        y = jax.lax.optimization_barrier(_product(w, x.reshape(rows, x.shape[-1]), (1,), (1,), dtype)).T
        return y.reshape(*x.shape[:-1], len(w))
    return _product(x, w, (x.ndim - 1,), (1,), dtype)


def _backward(dtype: jnp.dtype, saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, w = saved
    d_x = _product(cotangent, w, (x.ndim - 1,), (0,), x.dtype)
    if on_one_cpu():
        # docs/xla-notes.md: weight-gradient
        x, cotangent = (array.reshape(-1, array.shape[-1]) for array in (x, cotangent))
    batch = tuple(range(x.ndim - 1))
    return d_x, _product(cotangent, x, batch, batch, w.dtype)


_linear.defvjp(_forward, _backward)


def _product(a: Array, b: Array, a_axes: Axes, b_axes: Axes, dtype: jnp.dtype) -> Array:
    """The sum over some axes of each; the rest of b's axes follow the rest of a's."""
    if _at_highest() and a.dtype == b.dtype == dtype == jnp.float32:
        return _blocked(a, b, a_axes, b_axes)
    if a.dtype == b.dtype == jnp.bfloat16 and platform() == "cpu":
        return _bfloat16_on_cpu(a, b, a_axes, b_axes).astype(dtype)
    return jax.lax.dot_general(a, b, ((a_axes, b_axes), ((), ())), preferred_element_type=dtype)


def _at_highest() -> bool:
    return jax.config.jax_default_matmul_precision == "highest"  # type: ignore[attr-defined]


def _bfloat16_on_cpu(a: Array, b: Array, a_axes: Axes, b_axes: Axes) -> Array:
    """In the form that is fast, in float32 (docs/xla-notes.md: bfloat16-on-cpu)."""
    is_row = a.size == math.prod(a.shape[i] for i in a_axes)
    if is_row:
        a, a_axes = jnp.stack([a, jnp.zeros_like(a)]), tuple(i + 1 for i in a_axes)
    y = jax.lax.dot_general(a, b, ((a_axes, b_axes), ((), ())), preferred_element_type=jnp.float32)
    return y[0] if is_row else y


def _blocked(a: Array, b: Array, a_axes: Axes, b_axes: Axes) -> Array:
    """Summed over blocks of the inner axis one after the other."""
    a, b = jnp.moveaxis(a, a_axes, range(-len(a_axes), 0)), jnp.moveaxis(b, b_axes, range(len(b_axes)))
    shape = a.shape[: -len(a_axes)] + b.shape[len(b_axes) :]
    inner = math.prod(b.shape[: len(b_axes)])
    a, b = a.reshape(-1, inner), b.reshape(inner, -1)
    if inner <= BLOCK:
        return (a @ b).reshape(shape)
    padding = -inner % BLOCK
    a = jnp.pad(a, ((0, 0), (0, padding))).reshape(a.shape[0], -1, BLOCK).swapaxes(0, 1)
    b = jnp.pad(b, ((0, padding), (0, 0))).reshape(-1, BLOCK, b.shape[1])
    total = jnp.zeros((a.shape[1], b.shape[2]), a.dtype)
    return jax.lax.scan(lambda total, block: (total + block[0] @ block[1], None), total, (a, b))[0].reshape(shape)
