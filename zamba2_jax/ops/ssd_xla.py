"""The scan by chunks, in plain XLA: forward, and a backward that recomputes whatever is quadratic in the chunk.

A chunk is three matrix products (section 6 of arXiv:2405.21060): what its tokens give each other, what they add to
the state, and what the state at its start gives to them. Chunks are walked a window at a time, so that what is
computed on the way stays in the cache and takes no more memory than a window; those of a window are joined by an
associative scan.

Letters as in `typing`, and e for all channels of a group, r * p. A state is held as [b, g, n, e]: its
products with B and with C are single ones for all heads of a group. Products are spelt so that each operand lies in
memory as it is used, but for swaps of whole rows p (docs/xla-notes.md: operands-as-they-lie).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zamba2_jax.ops.decay import split
from zamba2_jax.ops.ssd_reference import join
from zamba2_jax.ops.sums import sum_over
from zamba2_jax.typing import Array, Bool, Float, at_least_fp32


@partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def ssd_xla(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    log_decay: Float[Array, "b t h"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    D: Float[Array, " h"] | None,
    initial_state: Float[Array, "b h p n"] | None,
    chunk_size: int,
    window: int,
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """The scan of `ops.ssd.ssd`, given the logarithms of its decays.

    Differentiable once, in reverse, in every floating-point argument. The backward pass keeps the inputs and one
    state per window.

    Args:
        x, B, C, D, initial_state: as for `ssd`.
        dt: time step, at least float32; 0 at padding.
        log_decay: of every token, from `decay.log_decays`.
        chunk_size: tokens per chunk, at most `decay.MAX_CHUNK`.
        window: chunks computed at once.

    Returns:
        y, in the dtype of x, and the state after the last token, at least float32.
    """
    return _forward(x, dt, log_decay, B, C, D, initial_state, chunk_size, window)[0]


class _Tokens(NamedTuple):
    """The inputs of a window, at least float32; all shapes after the leading axes [b, c, g].

    Attributes:
        x: [s, r, p].
        dt: [s, r].
        coarse, fine: the parts of the log decays, [s, r].
        B, C: [s, n].
    """

    x: Array
    dt: Array
    coarse: Array
    fine: Array
    B: Array
    C: Array


class _Window(NamedTuple):
    """What the forward and the backward pass of a window both compute first; shapes after [b, c, g].

    Attributes:
        scores: C_l . B_s for s <= l, else 0; [1, l, s].
        mixing: the coarse part of the decay from s to l, 1 for s > l; [r, l, s].
        fine: the fine part of the log decay from the start of the chunk to after a token, [s, r].
        from_start, to_end: decay from the start of the chunk to after a token, and from there to its end; [s, r].
        decay: of the whole chunk, for every channel; [1, e].
        starts: the state before each chunk, [n, e].
        end: the state after the last chunk, [b, g, n, e].
    """

    scores: Array
    mixing: Array
    fine: Array
    from_start: Array
    to_end: Array
    decay: Array
    starts: Array
    end: Array


def _forward(
    x: Array,
    dt: Array,
    log_decay: Array,
    B: Array,
    C: Array,
    D: Array | None,
    initial_state: Array | None,
    chunk_size: int,
    window: int,
) -> tuple[tuple[Array, Array], tuple[Array | None, ...]]:
    (b, t, h, p), (g, n), wide = x.shape, B.shape[2:], at_least_fp32(x.dtype)
    D_of_head = None if D is None else D.reshape(g, 1, -1, 1)
    arrays = _filled((x, dt, log_decay, B, C), chunk_size * window)
    state = jnp.zeros((b, h, p, n), wide) if initial_state is None else initial_state.astype(wide)

    def step(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        state, y = carry
        tokens = _tokens(arrays, i, chunk_size, window)
        now = _window(tokens, state)
        values = (tokens.dt * jnp.exp(-now.fine))[..., None] * tokens.x
        inner = _rows_swapped(_product(now.scores * now.mixing, _rows_swapped(values)))
        outer = _product(tokens.C, now.starts).reshape(tokens.x.shape)
        y_now = jnp.exp(now.fine)[..., None] * inner + now.from_start[..., None] * outer
        if D_of_head is not None:
            y_now += D_of_head * tokens.x
        return (now.end, _put(y, y_now, i)), state

    # Results begin as the inputs in whose place every number is written. docs/xla-notes.md: loops-hold-their-results
    first = _state_by_groups(state, g), arrays[0]
    (end, y), states = jax.lax.scan(step, first, jnp.arange(-(-t // (chunk_size * window))))
    results = y[:, :t], _state_by_heads(end, p)
    return results, (x, dt, log_decay, B, C, D, initial_state, states)


def _backward(
    chunk_size: int, window: int, residuals: tuple[Any, ...], cotangents: tuple[Array, Array]
) -> tuple[Array | None, ...]:
    x, dt, log_decay, B, C, D, initial_state, states = residuals
    (_, t, h, p), g, wide = x.shape, B.shape[2], at_least_fp32(x.dtype)
    D_of_head = None if D is None else D.reshape(g, 1, -1, 1)
    *arrays, d_y = _filled((x, dt, log_decay, B, C, cotangents[0]), chunk_size * window)
    d_end = _state_by_groups(cotangents[1].astype(wide), g)

    def step(carry: tuple[Array, Array, list[Array]], inputs: tuple[Array, Array]) -> tuple[Any, None]:
        (d_end, d_D, gradients), (i, state) = carry, inputs
        tokens, d_y_now = _tokens(arrays, i, chunk_size, window), _take(d_y, i, g, chunk_size, window)
        d_start, (d_x, *others) = _window_backward(tokens, _window(tokens, state), d_y_now, d_end)
        if D_of_head is not None:
            d_x += D_of_head * d_y_now
            d_D += jnp.sum(sum_over(d_y_now * tokens.x, -1), axis=(0, 1, 3))
        return (d_start, d_D, [_put(a, d, i) for a, d in zip(gradients, (d_x, *others), strict=True)]), None

    first = d_end, jnp.zeros((g, h // g), wide), arrays
    (d_start, d_D, gradients), _ = jax.lax.scan(step, first, (jnp.arange(len(states)), states), reverse=True)
    return (
        *(d[:, :t] for d in gradients),
        None if D is None else d_D.reshape(h).astype(D.dtype),
        None if initial_state is None else _state_by_heads(d_start, p).astype(initial_state.dtype),
    )


ssd_xla.defvjp(_forward, _backward)


def _window(tokens: _Tokens, state: Array) -> _Window:
    """Decays and states of a window, from the state before it."""
    x, dt, _, _, B, C = tokens
    causal = _causal(x.shape[-3])
    scores = jnp.where(causal, _product(C, B, (-1, -1)), 0)[..., None, :, :]
    coarse, fine = _sums(causal, tokens.coarse), _sums(causal, tokens.fine)
    by_head = _sums(causal, tokens.coarse, swapped=True)
    mixing = jnp.exp(jnp.minimum(by_head[..., :, None] - by_head[..., None, :], 0))

    from_start = jnp.exp(coarse) * jnp.exp(fine)
    to_end = jnp.exp(coarse[..., -1:, :] - coarse) * jnp.exp(fine[..., -1:, :] - fine)
    decay = jnp.repeat(from_start[..., -1:, :], x.shape[-1], axis=-1)
    added = _product(B, _channels((to_end * dt)[..., None] * x), (-2, -2))
    total_decay, ends = jax.lax.associative_scan(join, (decay, added), axis=1)
    ends += total_decay * state[:, None]
    starts = jnp.concatenate([state[:, None], ends[:, :-1]], axis=1)
    return _Window(scores, mixing, fine, from_start, to_end, decay, starts, ends[:, -1])


def _window_backward(tokens: _Tokens, now: _Window, d_y: Array, d_end: Array) -> tuple[Array, tuple[Array, ...]]:
    """Cotangents of the state before the window, and of x (but for the skip), dt, log_decay, B and C."""
    x, dt, _, _, B, C = tokens
    u, fine, causal = dt[..., None] * x, now.fine, _causal(x.shape[-3])

    # Through the states: of every chunk's end and, by the scan in reverse, of every chunk's start.
    from_outer = now.from_start[..., None] * d_y
    d_read = _product(C, _channels(from_outer), (-2, -2))
    total_decay, d_starts = jax.lax.associative_scan(join, (now.decay, d_read), axis=1, reverse=True)
    d_starts += total_decay * d_end[:, None]
    d_ends = jnp.concatenate([d_starts[:, 1:], d_end[:, None]], axis=1)
    d_u = now.to_end[..., None] * _product(B, d_ends).reshape(x.shape)
    d_log_to_end = sum_over(u * d_u, -1)
    d_log_from_start = sum_over(from_outer * _product(C, now.starts).reshape(x.shape), -1)
    d_decay = now.decay * _product(jnp.ones_like(C[..., :1, :]), now.starts * d_ends)
    d_log_decay = sum_over(d_decay.reshape(*d_decay.shape[:-1], *x.shape[-2:]), -1)
    d_log_decay += _sums(~causal.T, d_log_to_end) + _sums(causal.T, d_log_from_start)
    d_B = _product(_channels(now.to_end[..., None] * u), d_ends, (-1, -1))
    d_C = _product(_channels(from_outer), now.starts, (-1, -1))

    # Through the tokens of the same chunk; the fine part of the decays goes with the vectors.
    left, right = (_rows_swapped(a) for a in (jnp.exp(fine)[..., None] * d_y, jnp.exp(-fine)[..., None] * u))
    mixed = now.scores * now.mixing
    d_mixed = _product(left, right, (-1, -1))
    d_u += jnp.exp(-fine)[..., None] * _rows_swapped(_product(mixed, left, (-2, -2)))
    d_scores = jnp.where(causal, sum_over(d_mixed * now.mixing, -3), 0)
    d_B += _product(d_scores, C, (-2, -2))
    d_C += _product(d_scores, B)

    # log_decay k lies between s and l for s < k <= l: sums of nothing else, for differences would cancel.
    until = (d_mixed * mixed) @ jnp.where(causal, 0, jnp.ones((), x.dtype))
    d_log_decay += sum_over(jnp.where(causal, until, 0), -2).swapaxes(-1, -2)

    return d_starts[:, 0], (dt[..., None] * d_u, sum_over(x * d_u, -1), d_log_decay, d_B, d_C)


def _causal(size: int) -> Bool[Array, "l s"]:
    return jnp.tril(jnp.ones((size, size), bool))


def _rows_swapped(array: Float[Array, "*rest s r p"]) -> Float[Array, "*rest r s p"]:
    return array.swapaxes(-3, -2)


def _channels(array: Float[Array, "*rest r p"]) -> Float[Array, "*rest e"]:
    return array.reshape(*array.shape[:-2], -1)


def _product(a: Array, b: Array, axes: tuple[int, int] = (-1, -2), precision: str | None = None) -> Array:
    """Of matrices, over an axis of a and one of b, for each index before the last two."""
    contracting = (a.ndim + axes[0],), (b.ndim + axes[1],)
    batch = tuple(range(a.ndim - 2))
    return jax.lax.dot_general(a, b, (contracting, (batch, batch)), precision=precision)


def _sums(
    which: Bool[Array, "l s"], array: Float[Array, "*rest s r"], swapped: bool = False
) -> Float[Array, "*rest _ _"]:
    """For every l the sum over those s, [l, r]; `swapped` gives [r, l]."""
    # docs/xla-notes.md: slices-in-loops, sums-on-cpu
    ones = jnp.broadcast_to(which.astype(array.dtype), (*array.shape[:-2], *which.shape))
    return _product(array, ones, (-2, -1), "highest") if swapped else _product(ones, array, precision="highest")


def _filled(arrays: Sequence[Float[Array, "b t ..."]], size: int) -> list[Float[Array, "b u ..."]]:
    """With zeros, up to whole windows of that size: tokens with dt = log_decay = 0 change nothing."""
    return [jnp.pad(a, [(0, 0), (0, -a.shape[1] % size)] + [(0, 0)] * (a.ndim - 2)) for a in arrays]


def _tokens(arrays: Sequence[Float[Array, "b t ..."]], i: Array, chunk_size: int, window: int) -> _Tokens:
    """Window i of x, dt, log_decay, B and C."""
    g = arrays[-1].shape[2]
    x, dt, log_decay, B, C = (_take(array, i, g, chunk_size, window) for array in arrays)
    return _Tokens(x, dt, *split(log_decay), B[..., 0, :], C[..., 0, :])


def _take(
    array: Float[Array, "b t a *rest"], i: Array, g: int, chunk_size: int, window: int
) -> Float[Array, "b c g s r *rest"]:
    """Window i, with what differs from head to head by groups, at least float32."""
    # docs/xla-notes.md: loops-hold-their-results
    b, _, a, *rest = array.shape
    cut = jax.lax.dynamic_slice_in_dim(array, i * chunk_size * window, chunk_size * window, axis=1)
    return cut.reshape(b, window, chunk_size, g, a // g, *rest).swapaxes(2, 3).astype(at_least_fp32(array.dtype))


def _put(array: Float[Array, "b t *rest"], values: Float[Array, "b c g s ..."], i: Array) -> Float[Array, "b t *rest"]:
    """With these values as window i, in the dtype of the array."""
    b, window, _, chunk_size, *_ = values.shape
    cut = values.swapaxes(2, 3).astype(array.dtype).reshape(b, window * chunk_size, *array.shape[2:])
    return jax.lax.dynamic_update_slice_in_dim(array, cut, i * chunk_size * window, axis=1)


def _state_by_groups(state: Float[Array, "b h p n"], g: int) -> Float[Array, "b g n e"]:
    b, _, _, n = state.shape
    return state.reshape(b, g, -1, n).swapaxes(-1, -2)


def _state_by_heads(state: Float[Array, "b g n e"], p: int) -> Float[Array, "b h p n"]:
    b, _, n, _ = state.shape
    return state.swapaxes(-1, -2).reshape(b, -1, p, n)
