"""The selective scan by chunks, in plain XLA: forward, and a backward that recomputes the states of a chunk.

Within a chunk tokens are taken one after the other. Chunks are taken a window at a time; those of a window walk side by
side, and are joined by an associative scan of (decay, state). So the states in memory are those of one window and, for
the backward pass, one per window. Decays are only ever multiplied: nothing is divided by one, and no exponential is
above 1.

Letters as in `typing`; a state is held as [b, c, h, n, p], whose last axis is long enough to be vectorised. Products
with a state are single ones for every token (docs/xla-notes.md: states-apart-from-sums).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zamba2_jax.ops.ssd_reference import join
from zamba2_jax.typing import Array, Bool, Float, at_least_fp32


@partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def selective_scan_xla(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h p"],
    A: Float[Array, "h p n"],
    B: Float[Array, "b t h n"],
    C: Float[Array, "b t h n"],
    D: Float[Array, "h p"] | None,
    initial_state: Float[Array, "b h p n"] | None,
    restarts: Bool[Array, "b t"] | None,
    chunk_size: int,
    window: int,
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """The scan of `ops.selective_scan.selective_scan`.

    Differentiable once, in reverse, in every floating-point argument. The backward pass keeps the inputs and one state
    per window.

    Args:
        x, B, C, D, initial_state: as for `selective_scan`.
        dt: time step, at least float32; 0 at padding.
        A: at least float32.
        restarts: where the state begins anew, from 0; nowhere by default.
        chunk_size: tokens per chunk.
        window: chunks that are walked at once.

    Returns:
        y, in the dtype of x, and the state after the last token, at least float32.
    """
    return _forward(x, dt, A, B, C, D, initial_state, restarts, chunk_size, window)[0]


class _Tokens(NamedTuple):
    """The inputs of a window, at least float32.

    Attributes:
        x, dt: [s, b, c, h, p].
        B, C: [s, b, c, h, n].
        restarts: [s, b, c]; None for nowhere.
    """

    x: Array
    dt: Array
    B: Array
    C: Array
    restarts: Array | None


def _forward(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    initial_state: Array | None,
    restarts: Array | None,
    chunk_size: int,
    window: int,
) -> tuple[tuple[Array, Array], tuple[Array | None, ...]]:
    (b, t, h, p), n, wide = x.shape, A.shape[-1], at_least_fp32(x.dtype)
    arrays, rates = _filled((x, dt, B, C, restarts), chunk_size * window), A.swapaxes(1, 2)
    state = jnp.zeros((b, h, n, p), wide) if initial_state is None else _turned(initial_state).astype(wide)

    def step(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        state, y = carry
        tokens = _tokens(arrays, i, chunk_size, window)
        states = _states(tokens, rates, _starts(tokens, rates, state))
        y_now = _over_n(states, tokens.C)
        if D is not None:
            y_now += D * tokens.x
        return (states[-1, :, -1], _put(y, y_now, i)), state

    # docs/xla-notes.md: loops-hold-their-results
    (end, y), kept = jax.lax.scan(step, (state, arrays[0]), jnp.arange(-(-t // (chunk_size * window))))
    return (y[:, :t], _turned(end)), (x, dt, A, B, C, D, initial_state, restarts, kept)


def _backward(
    chunk_size: int, window: int, residuals: tuple[Any, ...], cotangents: tuple[Array, Array]
) -> tuple[Array | None, ...]:
    x, dt, A, B, C, D, initial_state, restarts, kept = residuals
    t, wide, rates = x.shape[1], at_least_fp32(x.dtype), A.swapaxes(1, 2)
    *arrays, d_y = _filled((x, dt, B, C, restarts, cotangents[0]), chunk_size * window)
    d_end = _turned(cotangents[1].astype(wide))

    def step(carry: tuple[Any, ...], inputs: tuple[Array, Array]) -> tuple[Any, None]:
        (d_end, d_rates, d_D, gradients), (i, state) = carry, inputs
        tokens, d_y_now = _tokens(arrays, i, chunk_size, window), _take(d_y, i, chunk_size, window)
        d_start, d_rates, (d_x, *others) = _window_backward(tokens, rates, state, d_y_now, d_end, d_rates)
        if D is not None:
            d_x += D * d_y_now
            d_D += jnp.sum(d_y_now * tokens.x, axis=(0, 1, 2))
        gradients = [_put(a, d, i) for a, d in zip(gradients, (d_x, *others), strict=True)]
        return (d_start, d_rates, d_D, gradients), None

    zeros = jnp.zeros((len(x), window, *rates.shape), wide), jnp.zeros(A.shape[:2], wide)
    (d_start, d_rates, d_D, gradients), _ = jax.lax.scan(
        step, (d_end, *zeros, arrays[:4]), (jnp.arange(len(kept)), kept), reverse=True
    )
    d_x, d_dt, d_B, d_C = (gradient[:, :t] for gradient in gradients)
    d_initial = None if initial_state is None else _turned(d_start).astype(initial_state.dtype)
    d_A = d_rates.sum((0, 1)).swapaxes(1, 2)
    return d_x, d_dt, d_A, d_B, d_C, None if D is None else d_D.astype(D.dtype), d_initial, None


selective_scan_xla.defvjp(_forward, _backward)


def _decay(dt: Float[Array, "b c h p"], rates: Float[Array, "h n p"], restart: Bool[Array, "b c"] | None) -> Array:
    """What is left of every state after a token, [b, c, h, n, p]."""
    decay = jnp.exp(dt[..., None, :] * rates)
    return decay if restart is None else jnp.where(restart[..., None, None, None], 0, decay)


def _after(state: Array, token: _Tokens, rates: Array) -> tuple[Array, Array]:
    """The state after one token of every chunk, and its decay."""
    decay = _decay(token.dt, rates, token.restarts)
    return decay * state + token.B[..., None] * (token.dt * token.x)[..., None, :], decay


def _states(tokens: _Tokens, rates: Array, starts: Float[Array, "b c h n p"]) -> Float[Array, "s b c h n p"]:
    """The state after every token."""

    def step(state: Array, token: _Tokens) -> tuple[Array, Array]:
        state, _ = _after(state, token, rates)
        return state, state

    return jax.lax.scan(step, starts, tokens)[1]


def _starts(tokens: _Tokens, rates: Array, state: Float[Array, "b h n p"]) -> Float[Array, "b c h n p"]:
    """The state before every chunk of a window, from that before the window."""
    b, c = tokens.x.shape[1:3]
    if c == 1:
        return state[:, None]

    def step(carry: tuple[Array, Array], token: _Tokens) -> tuple[tuple[Array, Array], None]:
        total, state = carry
        state, decay = _after(state, token, rates)
        return (total * decay, state), None

    ones = jnp.ones((b, c, *rates.shape), state.dtype)
    chunks, _ = jax.lax.scan(step, (ones, jnp.zeros_like(ones)), tokens)
    totals, ends = jax.lax.associative_scan(join, chunks, axis=1)
    ends += totals * state[:, None]
    return jnp.concatenate([state[:, None], ends[:, :-1]], axis=1)


def _d_ends(tokens: _Tokens, rates: Array, d_y: Array, d_end: Float[Array, "b h n p"]) -> Float[Array, "b c h n p"]:
    """The cotangent of the state after every chunk of a window, from that of the state after the window."""
    b, c = tokens.x.shape[1:3]
    if c == 1:
        return d_end[:, None]

    def step(carry: tuple[Array, Array], inputs: tuple[_Tokens, Array]) -> tuple[tuple[Array, Array], None]:
        (total, d_state), (token, d_y) = carry, inputs
        decay = _decay(token.dt, rates, token.restarts)
        return (total * decay, decay * (d_state + token.C[..., None] * d_y[..., None, :])), None

    ones = jnp.ones((b, c, *rates.shape), d_end.dtype)
    chunks, _ = jax.lax.scan(step, (ones, jnp.zeros_like(ones)), (tokens, d_y), reverse=True)
    totals, d_starts = jax.lax.associative_scan(join, chunks, axis=1, reverse=True)
    d_starts += totals * d_end[:, None]
    return jnp.concatenate([d_starts[:, 1:], d_end[:, None]], axis=1)


def _window_backward(
    tokens: _Tokens, rates: Array, state: Array, d_y: Array, d_end: Array, d_rates: Float[Array, "b c h n p"]
) -> tuple[Array, Array, tuple[Array, ...]]:
    """Cotangents of the state before the window, of the rates so far, and of x (but for the skip), dt, B and C."""
    starts = _starts(tokens, rates, state)
    states = _states(tokens, rates, starts)
    before = jnp.concatenate([starts[None], states[:-1]])

    def step(carry: tuple[Array, Array], inputs: tuple[_Tokens, Array, Array]) -> tuple[Any, tuple[Array, Array]]:
        (d_state, d_rates), (token, before, d_y) = carry, inputs
        d_state += token.C[..., None] * d_y[..., None, :]
        d_before = _decay(token.dt, rates, token.restarts) * d_state
        d_log = d_before * before
        return (d_before, d_rates + d_log * token.dt[..., None, :]), (d_state, d_log * rates)

    first = _d_ends(tokens, rates, d_y, d_end), d_rates
    (d_starts, d_rates), (d_states, d_logs) = jax.lax.scan(step, first, (tokens, before, d_y), reverse=True)
    added = _over_n(d_states, tokens.B)
    d_dt = _over_n(d_logs, jnp.ones_like(tokens.B)) + tokens.x * added
    d_B, d_C = _over_p(d_states, tokens.dt * tokens.x), _over_p(states, d_y)
    return d_starts[:, 0], d_rates, (tokens.dt * added, d_dt, d_B, d_C)


def _over_n(states: Float[Array, "s b c h n p"], B: Float[Array, "s b c h n"]) -> Float[Array, "s b c h p"]:
    return jnp.einsum("sbchnp,sbchn->sbchp", states, B, precision="highest")


def _over_p(states: Float[Array, "s b c h n p"], x: Float[Array, "s b c h p"]) -> Float[Array, "s b c h n"]:
    return jnp.einsum("sbchnp,sbchp->sbchn", states, x, precision="highest")


def _turned(state: Float[Array, "b h _ _"]) -> Float[Array, "b h _ _"]:
    """Between [b, h, p, n] and [b, h, n, p]."""
    return state.swapaxes(-1, -2)


def _filled(arrays: Sequence[Array | None], size: int) -> list[Any]:
    """With zeros, up to whole windows of that size: tokens with dt = 0 change nothing."""
    return [
        None if a is None else jnp.pad(a, [(0, 0), (0, -a.shape[1] % size)] + [(0, 0)] * (a.ndim - 2)) for a in arrays
    ]


def _tokens(arrays: Sequence[Any], i: Array, chunk_size: int, window: int) -> _Tokens:
    """Window i of x, dt, B, C and the restarts."""
    *numbers, restarts = arrays
    x, dt, B, C = (_take(array, i, chunk_size, window) for array in numbers)
    return _Tokens(x, dt, B, C, None if restarts is None else _take(restarts, i, chunk_size, window))


def _take(array: Array, i: Array, chunk_size: int, window: int) -> Array:
    """Window i of an array [b, t, *rest], as [s, b, c, *rest]; numbers in at least float32."""
    # docs/xla-notes.md: loops-hold-their-results
    cut = jax.lax.dynamic_slice_in_dim(array, i * chunk_size * window, chunk_size * window, axis=1)
    cut = jnp.moveaxis(cut.reshape(len(array), window, chunk_size, *array.shape[2:]), 2, 0)
    return cut if array.dtype == bool else cut.astype(at_least_fp32(array.dtype))


def _put(array: Float[Array, "b t *rest"], values: Float[Array, "s b c *rest"], i: Array) -> Float[Array, "b t *rest"]:
    """With these values as window i, in the dtype of the array."""
    chunk_size, b, window, *rest = values.shape
    cut = jnp.moveaxis(values, 0, 2).astype(array.dtype).reshape(b, window * chunk_size, *rest)
    return jax.lax.dynamic_update_slice_in_dim(array, cut, i * chunk_size * window, axis=1)
