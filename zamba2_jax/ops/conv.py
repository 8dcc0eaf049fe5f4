"""Causal depthwise convolution over time, whole sequences and one step."""

import jax.numpy as jnp

from zamba2_jax.ops.segments import document_index
from zamba2_jax.typing import Array, Float, Int, at_least_fp32


def causal_conv1d(
    x: Float[Array, "b t e"],
    w: Float[Array, "k e"],
    bias: Float[Array, " e"],
    *,
    initial_state: Float[Array, "b k-1 e"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t e"], Float[Array, "b k-1 e"]]:
    """y_t = bias + sum_j w_j x_{t - (k-1) + j}, each channel on its own.

    Args:
        x: input.
        w: taps, the last one on the current token.
        bias: one per channel.
        initial_state: the k-1 inputs before the row, oldest first; zeros by default. It belongs to the first document.
        segment_ids: documents; taps that would reach into another one, or into padding, read 0. See `ops.segments`.

    Returns:
        y, in the dtype of x, and the last k-1 real inputs of each row's last document, oldest first.
    """
    taps, length = w.shape[0], x.shape[1]
    window = _window(x, taps, initial_state, segment_ids)
    document = None if segment_ids is None else _window_documents(segment_ids, taps)
    y = bias
    for j in range(taps):  # written out: on CPU XLA's sum of products over an axis takes ten times as long
        term = window[:, j : j + length]
        if document is not None:
            own = document[:, j : j + length] == document[:, taps - 1 :]
            term = jnp.where(own[..., None], term, 0)
        y = y + term.astype(at_least_fp32(x.dtype)) * w[j]
    return y.astype(x.dtype), last_inputs(x, taps, initial_state=initial_state, segment_ids=segment_ids)


def last_inputs(
    x: Float[Array, "b t e"],
    taps: int,
    *,
    initial_state: Float[Array, "b past e"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
) -> Float[Array, "b past e"]:
    """The state after `causal_conv1d` with so many taps; arguments as there."""
    window = _window(x, taps, initial_state, segment_ids)
    if segment_ids is None:
        return window[:, x.shape[1] :]
    document = _window_documents(segment_ids, taps)
    end = jnp.max(jnp.where(segment_ids != 0, jnp.arange(x.shape[1]) + 1, 0), axis=1)  # after the last real input
    last = end[:, None] + jnp.arange(taps - 1)  # the k-1 inputs up to there, as indices of the window
    own = jnp.take_along_axis(document, last, axis=1) == document[:, -1:]
    return jnp.where(own[..., None], jnp.take_along_axis(window, last[..., None], axis=1), 0)


def _window(x: Array, taps: int, initial_state: Array | None, segment_ids: Array | None) -> Float[Array, "b s e"]:
    """The inputs after the k-1 before them, 0 at padding."""
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], taps - 1, x.shape[2]), x.dtype)
    if segment_ids is not None:
        x = jnp.where(segment_ids[..., None] != 0, x, 0)
    return jnp.concatenate([initial_state.astype(x.dtype), x], axis=1)


def _window_documents(segment_ids: Int[Array, "b t"], taps: int) -> Int[Array, "b s"]:
    """Which document each entry of the window belongs to."""
    return jnp.pad(document_index(segment_ids), ((0, 0), (taps - 1, 0)))


def causal_conv1d_step(
    x: Float[Array, "b e"], w: Float[Array, "k e"], bias: Float[Array, " e"], state: Float[Array, "b k-1 e"]
) -> tuple[Float[Array, "b e"], Float[Array, "b k-1 e"]]:
    """One step of `causal_conv1d`: y for the input x after the k-1 inputs in `state`, and the next state."""
    y, state = causal_conv1d(x[:, None], w, bias, initial_state=state)
    return y[:, 0], state
