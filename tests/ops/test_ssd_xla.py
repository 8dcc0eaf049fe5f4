"""The chunked scan by itself: windows of several chunks, memory, and rows that only it can take."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import as_dtype, assert_close, assert_finite
from tests.ops.ssd_arguments import ssd_arguments
from zamba2_jax.ops import ssd, ssd_sequential
from zamba2_jax.ops.decay import log_decays
from zamba2_jax.ops.ssd_xla import ssd_xla

b, t, h, p, n, g = 3, 29, 6, 5, 7, 2


def arguments(length=t, rows=b):
    return ssd_arguments(rows, length, h, p, g, n)


@partial(jax.jit, static_argnums=0)
def with_gradients(scan, inputs):
    outputs, pull = jax.vjp(lambda inputs: scan(**inputs), inputs)
    return outputs, pull(outputs)


def in_windows(chunk_size, window, x, dt, A, B, C, D, initial_state):
    return ssd_xla(x, dt, log_decays(dt, A), B, C, D, initial_state, chunk_size, window)


@pytest.mark.parametrize(("chunk_size", "window"), [(4, 3), (3, 2), (2, 16), (29, 1), (1, 5)])
def test_windows(x64, chunk_size, window):
    """29 tokens fill none of them but the one of 29."""
    inputs = as_dtype(arguments(), jnp.float64)
    got = with_gradients(partial(in_windows, chunk_size, window), inputs)
    assert_close(got, with_gradients(ssd_sequential, inputs), 1e-12)


@pytest.mark.parametrize("implementation", ["xla"])
def test_robust(x64, implementation):
    """dt from 1e-6 to 1e3, A from -1e-4 to -1e4: results and gradients as exact as float32 allows."""
    rng = np.random.default_rng(1)
    inputs = arguments(length=200)
    inputs["dt"] = 10 ** rng.uniform(-6, 3, inputs["dt"].shape)
    inputs["A"] = -(10 ** np.linspace(-4, 4, h))
    inputs["x"] /= 1 + inputs["dt"][..., None]  # or the largest steps would be all that a norm sees
    low = as_dtype(inputs, jnp.float32)
    outputs, gradients = with_gradients(partial(ssd, implementation=implementation), low)
    expected = with_gradients(ssd_sequential, as_dtype(low, jnp.float64))
    assert_close((outputs, gradients), expected, 2e-6)


def test_zeros_and_nothing_but_padding():
    inputs = {name: jnp.zeros_like(array, jnp.float32) for name, array in arguments().items()}
    padding = jnp.zeros((b, t), int)
    outputs, gradients = with_gradients(partial(ssd, segment_ids=padding), inputs)
    assert_finite((outputs, gradients))
    full = as_dtype(arguments(), jnp.float32)
    (_, state), gradients = with_gradients(partial(ssd, segment_ids=padding), full)
    np.testing.assert_array_equal(state, full["initial_state"])
    assert_finite(gradients)


@pytest.mark.parametrize("length", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_long_document(x64, length):
    """Errors do not grow with the length: decays forget them."""
    inputs = as_dtype(arguments(length=length, rows=1), jnp.float32)
    got = with_gradients(ssd, inputs)
    assert_close(got, with_gradients(ssd_sequential, as_dtype(inputs, jnp.float64)), 2e-6)


def test_memory_of_the_gradient():
    """All that 16k tokens take beside inputs and gradients, at most 1.5 times the inputs; compiled, not run."""
    t, h, p, n = 16384, 64, 64, 64
    x, per_head, B = ((1, t, h, p), (1, t, h), (1, t, 1, n))
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x, per_head, (h,), B, B, (h,))]

    def gradient(*inputs):
        return jax.vjp(lambda *inputs: ssd(*inputs)[0], *inputs)[1](inputs[0])

    memory = jax.jit(gradient).lower(*inputs).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.5 * sum(4 * np.prod(a.shape) for a in inputs)
