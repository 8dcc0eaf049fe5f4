"""Sums of log decays are exact where they have to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zamba2_jax.ops.decay import MAX_CHUNK, forget, log_decays, split


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_forget_leaves_nothing(x64, dtype):
    assert jnp.exp(jnp.asarray(forget(dtype), dtype)) == 0


def test_sums_over_the_longest_chunk():
    """Of terms over five decades: coarse sums and their differences without an error, fine ones below 1."""
    rng = np.random.default_rng(0)
    a = np.maximum(-(10 ** rng.uniform(-3, 2.5, (3, MAX_CHUNK))), -128).astype(np.float32)
    coarse, fine = split(jnp.asarray(a))
    np.testing.assert_array_equal(np.float64(coarse) + np.float64(fine), a)
    sums = jnp.cumsum(coarse, axis=1)
    np.testing.assert_array_equal(sums, np.cumsum(np.float64(coarse), axis=1))
    np.testing.assert_array_equal(
        sums[:, :, None] - sums[:, None], np.float64(sums)[:, :, None] - np.float64(sums)[:, None]
    )
    assert jnp.abs(jnp.cumsum(jnp.abs(fine), axis=1)).max() < 1


def test_documents_restart():
    dt, A = jnp.full((2, 6, 3), 0.5), jnp.array([-1.0, 0.0, -1e38])
    got = log_decays(dt, A, jnp.array([[1, 1, 2, 2, 0, 3], [0, 4, 4, 0, 4, 4]]))
    expected = np.tile(np.float32([-0.5, 0, -128]), (2, 6, 1))
    expected[0, [2, 5]] = -128
    np.testing.assert_array_equal(got, expected)


def test_gradients_of_what_is_forgotten_are_zero():
    """dt A beyond what counts has no slope; it has not even a product that fits into float32."""
    dt = jnp.array([[[1e3, 1e3, 0.25]]])
    A = jnp.array([-1e38, -1.0, -2.0])
    d_dt, d_A = jax.grad(lambda dt, A: log_decays(dt, A).sum(), argnums=(0, 1))(dt, A)
    np.testing.assert_array_equal(d_dt, [[[0, 0, -2]]])
    np.testing.assert_array_equal(d_A, [0, 0, 0.25])
