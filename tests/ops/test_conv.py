"""The causal convolution against a plain loop in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.helpers import assert_close, normal
from tests.ops.segment_rows import ALL_ROWS, LENGTH, documents
from zamba2_jax import ops

TAPS, WIDTH = 4, 3

causal_conv1d = jax.jit(ops.causal_conv1d, static_argnames="activation")
causal_conv1d_step = jax.jit(ops.causal_conv1d_step, static_argnames="activation")


def loop(x, w, bias, initial_state, segment_ids):
    """y, 0 at padding, and the last k-1 inputs of the last document.

    The inputs of a document are those at its times, and the padding before it in its row reads 0. What came before
    the row belongs to the first document.
    """
    y, states = np.zeros_like(x), np.array(initial_state)
    for row, ids in enumerate(segment_ids):
        for number, times in enumerate(documents(ids)):
            past = np.zeros((TAPS - 1 + times[0], WIDTH))
            if number == 0:
                past[: TAPS - 1] = initial_state[row]
            for i in times:
                past = np.concatenate([past, x[row, i : i + 1]])
                y[row, i] = bias + np.sum(past[-TAPS:] * w, axis=0)
            states[row] = past[-(TAPS - 1) :]
    return y, states


def arguments(rows, length):
    return normal(rows, length, WIDTH), normal(TAPS, WIDTH), normal(WIDTH), normal(rows, TAPS - 1, WIDTH)


def test_equals_the_loop(x64):
    x, w, bias, state = arguments(2, 7)
    ids = np.ones((2, 7), int)
    expected = loop(*map(np.asarray, (x, w, bias, state)), ids)
    assert_close(causal_conv1d(x, w, bias, initial_state=state), expected, 1e-14)
    assert_close(causal_conv1d(x, w, bias, initial_state=state, segment_ids=jnp.asarray(ids)), expected, 1e-14)
    zeros = jnp.zeros_like(state)
    assert_close(causal_conv1d(x, w, bias), loop(*map(np.asarray, (x, w, bias, zeros)), ids), 1e-14)


def test_every_short_row_of_documents(x64):
    x, w, bias, state = arguments(len(ALL_ROWS), LENGTH)
    # Finite, and large enough to be seen, were padding read.
    x = jnp.where(ALL_ROWS[..., None] == 0, 1e6, x)
    y, last = causal_conv1d(x, w, bias, initial_state=state, segment_ids=jnp.asarray(ALL_ROWS))
    y = jnp.where(ALL_ROWS[..., None] == 0, 0, y)
    expected_y, expected_last = loop(*map(np.asarray, (x, w, bias, state)), ALL_ROWS)
    assert_close(y, expected_y, 1e-14)
    np.testing.assert_array_equal(last, expected_last)


@pytest.mark.parametrize("split", range(1, 7))
def test_a_row_in_two_pieces_is_the_row(x64, split):
    x, w, bias, state = arguments(2, 7)
    y, last = causal_conv1d(x, w, bias, initial_state=state)
    y1, between = causal_conv1d(x[:, :split], w, bias, initial_state=state)
    y2, end = causal_conv1d(x[:, split:], w, bias, initial_state=between)
    assert_close((jnp.concatenate([y1, y2], axis=1), end), (y, last), 1e-14)


def test_steps_are_the_row(x64):
    x, w, bias, state = arguments(2, 7)
    expected = causal_conv1d(x, w, bias, initial_state=state)
    ys = []
    for i in range(7):
        y, state = causal_conv1d_step(x[:, i], w, bias, state)
        ys.append(y)
    assert_close((jnp.stack(ys, axis=1), state), expected, 1e-14)


@pytest.mark.parametrize("ids", [None, ALL_ROWS[[1, 60, 200]]], ids=["no documents", "documents"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients_are_those_of_finite_differences(x64, ids, activation):
    x, w, bias, state = arguments(3, LENGTH)
    segment_ids = None if ids is None else jnp.asarray(ids)

    def from_state(x, w, bias, state):
        return causal_conv1d(x, w, bias, activation=activation, initial_state=state, segment_ids=segment_ids)

    def from_zeros(x, w, bias):
        return causal_conv1d(x, w, bias, activation=activation, segment_ids=segment_ids)

    check_grads(from_state, (x, w, bias, state), order=1, modes=["rev"])
    check_grads(from_zeros, (x, w, bias), order=1, modes=["rev"])


def test_activation(x64):
    x, w, bias, state = arguments(2, 7)
    y, last = causal_conv1d(x, w, bias, initial_state=state)
    assert_close(causal_conv1d(x, w, bias, activation="silu", initial_state=state), (y / (1 + np.exp(-y)), last), 1e-14)
    y, last = causal_conv1d_step(x[:, 0], w, bias, state)
    assert_close(causal_conv1d_step(x[:, 0], w, bias, state, activation="silu"), (y / (1 + np.exp(-y)), last), 1e-14)


def test_another_activation_is_named(unchecked):
    x, w, bias, _ = arguments(2, 7)
    with pytest.raises(ValueError, match="activation='gelu': expected None or 'silu'"):
        ops.causal_conv1d(x, w, bias, activation="gelu")


def test_one_tap_has_no_state():
    x, w, bias = normal(2, 5, 3), normal(1, 3), normal(3)
    y, state = causal_conv1d(x, w, bias, segment_ids=jnp.ones((2, 5), int))
    np.testing.assert_allclose(y, x * w + bias, rtol=1e-6)
    assert state.shape == (2, 0, 3)


def test_bfloat16_is_summed_in_float32():
    """Taps of 1 and 2^-9: in bfloat16 the small ones would vanish, 1 + 3 * 2^-9 rounds up to 1 + 2^-7."""
    x = jnp.ones((1, 4, 1), jnp.bfloat16)
    w, bias = jnp.array([[2**-9]] * 3 + [[1.0]], jnp.bfloat16), jnp.zeros(1)
    y, state = causal_conv1d(x, w, bias)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert y[0, 3, 0] == 1 + 2**-7
    y, _ = causal_conv1d_step(x[:, 3], w, bias, x[:, :3])
    assert y[0, 0] == 1 + 2**-7
