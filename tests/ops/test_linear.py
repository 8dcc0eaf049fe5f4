import jax.numpy as jnp
import numpy as np

from tests.helpers import assert_close, normal
from zamba2_jax.ops import adapter, linear


def test_linear_and_adapter(x64):
    x, w, bias = normal(2, 3, 5), normal(5, 4), normal(4)
    expected = np.einsum("bti,io->bto", x, w)
    assert_close(linear(x, w), expected, 1e-14)
    assert_close(linear(x, w, bias), expected + bias, 1e-14)
    assert_close(linear(x[0, 0], w, bias), expected[0, 0] + bias, 1e-14)
    a, b = normal(5, 2), normal(2, 7)
    assert_close(adapter(x, a, b), x @ (a @ b), 1e-14)


def test_bfloat16_accumulates_in_float32_and_rounds_once():
    """257 ones: each partial sum past 256 is rounded away in bfloat16. With the bias of 1, 258 is exact."""
    x, w = jnp.ones((1, 257), jnp.bfloat16), jnp.ones((257, 1), jnp.bfloat16)
    wide = linear(x, w, dtype=jnp.float32)
    assert wide.dtype == jnp.float32
    assert wide[0, 0] == 257
    out = linear(x, w, jnp.ones(1))
    assert out.dtype == jnp.bfloat16
    assert out[0, 0] == 258
