import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import assert_close, normal
from zamba2_jax.ops import linear
from zamba2_jax.ops.linear import BLOCK, FEW_ROWS


def test_products_and_biases(x64):
    x, w, bias = normal(2, 3, 5), normal(4, 5), normal(4)
    expected = np.einsum("bti,oi->bto", x, w)
    assert_close(linear(x, w), expected, 1e-14)
    assert_close(linear(x, w, bias), expected + bias, 1e-14)
    assert_close(linear(x[0, 0], w, bias), expected[0, 0] + bias, 1e-14)


def test_bfloat16_accumulates_in_float32_and_rounds_once():
    """257 ones: each partial sum past 256 is rounded away in bfloat16. With the bias of 1, 258 is exact."""
    x, w = jnp.ones((1, 257), jnp.bfloat16), jnp.ones((1, 257), jnp.bfloat16)
    wide = linear(x, w, dtype=jnp.float32)
    assert wide.dtype == jnp.float32
    assert wide[0, 0] == 257
    out = linear(x, w, jnp.ones(1))
    assert out.dtype == jnp.bfloat16
    assert out[0, 0] == 258


@pytest.mark.parametrize("batch", [(), (1, 1), (2, 3)])
def test_bfloat16_in_value_and_gradient(batch):
    """Products of bfloat16 numbers are exact in float32: what is left is one rounding, to 2^-9 of each value."""
    x, w, cotangent = (normal(*shape, dtype=jnp.bfloat16) for shape in ((*batch, 40), (7, 40), (*batch, 7)))
    y, backward = jax.vjp(linear, x, w)
    dx, dw = backward(cotangent)
    assert y.dtype == dx.dtype == dw.dtype == jnp.bfloat16
    wide_x, wide_w, wide_cotangent = (np.asarray(array, np.float64) for array in (x, w, cotangent))
    assert_close(y, wide_x @ wide_w.T, 2**-8)
    assert_close(dx, wide_cotangent @ wide_w, 2**-8)
    assert_close(dw, wide_cotangent.reshape(-1, 7).T @ wide_x.reshape(-1, 40), 2**-8)


@pytest.mark.parametrize("inner", [BLOCK - 3, 3 * BLOCK, 17 * BLOCK + 5])
def test_blocked_sums_are_exact_to_rounding_in_value_and_gradient(inner):
    """Blocks bound the error by that of sums of BLOCK + inner / BLOCK terms: 2.5 ulp, where one long sum has 4 to 8."""
    x, w = normal(2, 35, inner, dtype=jnp.float32), normal(300, inner, dtype=jnp.float32)
    cotangent = normal(2, 35, 300, dtype=jnp.float32)
    with jax.default_matmul_precision("highest"):
        assert ("scan" in str(jax.make_jaxpr(linear)(x, w))) == (inner > BLOCK)
        y, backward = jax.vjp(linear, x, w)
        dx, dw = backward(cotangent)
    wide_x, wide_w, wide_cotangent = (np.asarray(array, np.float64) for array in (x, w, cotangent))
    expected = {
        "y": (y, wide_x @ wide_w.T),
        "dx": (dx, wide_cotangent @ wide_w),
        "dw": (dw, np.einsum("bto,bti->oi", wide_cotangent, wide_x)),
    }
    for name, (actual, exact) in expected.items():
        error = np.linalg.norm(actual - exact) / np.linalg.norm(exact)
        assert error < 2.5 * np.finfo(np.float32).eps, name


@pytest.mark.parametrize("batch", [(2,), (1, 2), (3, 1), (FEW_ROWS // 8, 8), (FEW_ROWS + 1,)])
def test_few_rows_of_float32_in_value_and_gradient(batch):
    """With the sides in that order in the compiled program too: XLA undoes it where nothing keeps it from it."""
    x, w, cotangent = (normal(*shape, dtype=jnp.float32) for shape in ((*batch, 40), (7, 40), (*batch, 7)))

    def one_more(x, w):
        return linear(x, w) + 1

    rows = str(math.prod(batch))
    product = re.search(r"= f32\[(\d+),(\d+)\]\S* dot\(", jax.jit(one_more).lower(x, w).compile().as_text())
    assert product is not None
    assert product.groups() == (("7", rows) if int(rows) <= FEW_ROWS else (rows, "7"))

    y, backward = jax.vjp(jax.jit(one_more), x, w)
    dx, dw = backward(cotangent)
    wide_x, wide_w, wide_cotangent = (np.asarray(array, np.float64) for array in (x, w, cotangent))
    assert_close(y, wide_x @ wide_w.T + 1, 1e-6)
    assert_close(dx, wide_cotangent @ wide_w, 1e-6)
    assert_close(dw, wide_cotangent.reshape(-1, 7).T @ wide_x.reshape(-1, 40), 1e-6)
