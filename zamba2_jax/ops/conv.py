"""Causal depthwise convolution over time, whole sequences and one step."""

from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from zamba2_jax.ops.placement import compiled_apart
from zamba2_jax.ops.segments import document_index
from zamba2_jax.typing import Array, Bool, Float, Int, at_least_fp32

Activation = Literal["silu"]


def causal_conv1d(
    x: Float[Array, "b t e"],
    w: Float[Array, "k e"],
    bias: Float[Array, " e"],
    *,
    activation: Activation | None = None,
    initial_state: Float[Array, "b k-1 e"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    custom_gradient: bool = True,
) -> tuple[Float[Array, "b t e"], Float[Array, "b k-1 e"]]:
    """y_t = activation(bias + sum_j w_j x_{t - (k-1) + j}), each channel on its own.

    With `custom_gradient` differentiable once, in reverse: the backward pass keeps the arguments, and computes the rest
    again. Without, as often as wanted, in any mode.

    Args:
        x: input.
        w: taps, the last one on the current token.
        bias: one per channel.
        activation: silu or none; in at least float32, as the sum before it.
        initial_state: the k-1 inputs before the row, oldest first; zeros by default. It belongs to the first document.
        segment_ids: documents; taps that would reach into another one, or into padding, read 0. See `ops.segments`.

    Returns:
        y, in the dtype of x, and the last k-1 real inputs of each row's last document, oldest first.

    Raises:
        ValueError: `activation` is another one.
    """
    if activation not in (None, *get_args(Activation)):
        raise ValueError(f"activation={activation!r}: expected None or 'silu'")
    convolve = _convolve if custom_gradient else _convolved
    y = convolve(x, w, bias, initial_state, segment_ids, activation)
    return y, last_inputs(x, len(w), initial_state=initial_state, segment_ids=segment_ids)


def _convolved(
    x: Array,
    w: Array,
    bias: Array,
    initial_state: Array | None,
    segment_ids: Array | None,
    activation: Activation | None,
) -> Array:
    y = _sum(_terms(_window(x, len(w), initial_state, segment_ids), _own(segment_ids, len(w)), len(w)), w, bias)
    return (jax.nn.silu(y) if activation else y).astype(x.dtype)


_convolve = jax.custom_vjp(_convolved, nondiff_argnums=(5,))


def _forward(*arguments: Any) -> tuple[Array, tuple[Any, ...]]:
    return _convolved(*arguments), arguments[:-1]


def _backward(activation: Activation | None, saved: tuple[Any, ...], cotangent: Array) -> tuple[Array | None, ...]:
    return *compiled_apart(partial(_gradients, activation), saved, cotangent), None


_convolve.defvjp(_forward, _backward)


def _gradients(activation: Activation | None, saved: tuple[Any, ...], cotangent: Array) -> tuple[Array | None, ...]:
    """Cotangents of x, w, bias and the initial state."""
    x, w, bias, initial_state, segment_ids = saved
    taps, d_y = len(w), cotangent.astype(at_least_fp32(x.dtype))
    window, of_window = jax.vjp(lambda x, state: _window(x, taps, state, segment_ids), x, initial_state)
    own = _own(segment_ids, taps)
    terms = _terms(window, own, taps)
    if activation:
        y = _sum(terms, w, bias)
        sigmoid = jax.nn.sigmoid(y)
        d_y *= sigmoid + y * sigmoid * (1 - sigmoid)
    d_w = jnp.stack([jnp.sum(d_y * term, (0, 1)) for term in terms])
    d_window = jnp.zeros((), d_y.dtype)
    for j in range(taps):
        d_term = d_y * w[j] if own is None else jnp.where(own[j], d_y * w[j], 0)
        d_window += jnp.pad(d_term, ((0, 0), (j, taps - 1 - j), (0, 0)))
    d_x, d_state = of_window(d_window.astype(window.dtype))
    return d_x, d_w.astype(w.dtype), jnp.sum(d_y, (0, 1)).astype(bias.dtype), d_state


def _terms(
    window: Float[Array, "b s e"], own: list[Bool[Array, "b t 1"]] | None, taps: int
) -> list[Float[Array, "b t e"]]:
    """What each tap reads, in at least float32."""
    length = window.shape[1] - taps + 1
    terms = [window[:, j : j + length] for j in range(taps)]
    if own is not None:
        terms = [jnp.where(reads, term, 0) for reads, term in zip(own, terms, strict=True)]
    return [term.astype(at_least_fp32(window.dtype)) for term in terms]


def _sum(terms: list[Float[Array, "b t e"]], w: Float[Array, "k e"], bias: Float[Array, " e"]) -> Float[Array, "b t e"]:
    y = bias
    for j, term in enumerate(terms):  # docs/xla-notes.md: convolution-on-cpu
        y = y + term * w[j]
    return y


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


def _own(segment_ids: Int[Array, "b t"] | None, taps: int) -> list[Bool[Array, "b t 1"]] | None:
    """For each tap whether what it reads belongs to the document of the token."""
    if segment_ids is None:
        return None
    document, length = _window_documents(segment_ids, taps), segment_ids.shape[1]
    return [(document[:, j : j + length] == document[:, taps - 1 :])[..., None] for j in range(taps)]


def causal_conv1d_step(
    x: Float[Array, "b e"],
    w: Float[Array, "k e"],
    bias: Float[Array, " e"],
    state: Float[Array, "b k-1 e"],
    *,
    activation: Activation | None = None,
    custom_gradient: bool = True,
) -> tuple[Float[Array, "b e"], Float[Array, "b k-1 e"]]:
    """One step of `causal_conv1d`: y for the input x after the k-1 inputs in `state`, and the next state."""
    y, state = causal_conv1d(
        x[:, None], w, bias, activation=activation, initial_state=state, custom_gradient=custom_gradient
    )
    return y[:, 0], state
