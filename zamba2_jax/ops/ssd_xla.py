"""The scan by chunks, in plain XLA: forward, and a backward that recomputes whatever is quadratic in the chunk.

A chunk is three matrix products (section 6 of arXiv:2405.21060): what its tokens give each other, what they add to
the state, and what the state at its start gives to them. Chunks are walked a window at a time, so that what is
computed on the way stays in the cache and takes no more memory than a window; those of a window are joined by an
associative scan.

Letters as in `typing`, w for windows and e for all channels of a group, r * p. A state is held as [b, g, n, e]: its
products with B and with C are single ones for all heads of a group. Products are spelt so that each operand lies in
memory as it is used, but for swaps of whole rows p: XLA would rather transpose while it computes.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from zamba2_jax.ops.decay import split
from zamba2_jax.ops.ssd_reference import join
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
    """The inputs by chunks, at least float32; all shapes after the leading axes [b, c, g], or [w, b, c, g] of all.

    Attributes:
        x: [s, r, p].
        dt: [s, r].
        coarse, fine: the parts of the log decays, summed from the start of the chunk; [s, r].
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
        from_start, to_end: decay from the start of the chunk to after a token, and from there to its end; [s, r].
        decay: of the whole chunk, for every channel; [1, e].
        starts: the state before each chunk, [n, e].
        end: the state after the last chunk, [b, g, n, e].
    """

    scores: Array
    mixing: Array
    from_start: Array
    to_end: Array
    decay: Array
    starts: Array
    end: Array


def _forward(x, dt, log_decay, B, C, D, initial_state, chunk_size, window):
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    D_of_head = None if D is None else D.reshape(g, 1, -1, 1)
    tokens = _by_windows(x, dt, log_decay, B, C, chunk_size, window)
    state = jnp.zeros((b, h, p, n), tokens.x.dtype) if initial_state is None else initial_state.astype(tokens.x.dtype)

    def step(state: Array, tokens: _Tokens) -> tuple[Array, tuple[Array, Array]]:
        now = _window(tokens, state)
        values = (tokens.dt * jnp.exp(-tokens.fine))[..., None] * tokens.x
        inner = _rows_swapped(_product(now.scores * now.mixing, _rows_swapped(values)))
        outer = _product(tokens.C, now.starts).reshape(tokens.x.shape)
        y = jnp.exp(tokens.fine)[..., None] * inner + now.from_start[..., None] * outer
        if D_of_head is not None:
            y += D_of_head * tokens.x
        return now.end, (y.astype(x.dtype), state)

    end, (y, states) = jax.lax.scan(step, _state_by_groups(state, g), tokens)
    results = _by_time(y, t).reshape(x.shape), _state_by_heads(end, p)
    return results, (x, dt, log_decay, B, C, D, initial_state, states)


def _backward(chunk_size, window, residuals, cotangents):
    x, dt, log_decay, B, C, D, initial_state, states = residuals
    (b, t, h, p), g = x.shape, B.shape[2]
    D_of_head = None if D is None else D.reshape(g, 1, -1, 1)
    tokens = _by_windows(x, dt, log_decay, B, C, chunk_size, window)
    d_y = _windows(cotangents[0].astype(tokens.x.dtype).reshape(b, t, g, -1, p), chunk_size, window)
    d_end = _state_by_groups(cotangents[1].astype(tokens.x.dtype), g)

    def step(carry: tuple[Array, Array], inputs: tuple[_Tokens, Array, Array]) -> tuple[tuple[Array, Array], tuple]:
        (d_end, d_D), (tokens, state, d_y) = carry, inputs
        d_start, (d_x, *others) = _window_backward(tokens, _window(tokens, state), d_y, d_end)
        if D_of_head is not None:
            d_x += D_of_head * d_y
            d_D += jnp.sum(_sum(d_y * tokens.x, -1), axis=(0, 1, 3))
        return (d_start, d_D), (d_x.astype(x.dtype), *others)

    zero = jnp.zeros((g, h // g), tokens.x.dtype)
    (d_start, d_D), outputs = jax.lax.scan(step, (d_end, zero), (tokens, states, d_y), reverse=True)
    arguments = (x, dt, log_decay, B, C)
    d_arguments = [_by_time(d, t).reshape(a.shape).astype(a.dtype) for d, a in zip(outputs, arguments, strict=True)]
    return (
        *d_arguments,
        None if D is None else d_D.reshape(h).astype(D.dtype),
        None if initial_state is None else _state_by_heads(d_start, p).astype(initial_state.dtype),
    )


ssd_xla.defvjp(_forward, _backward)


def _window(tokens: _Tokens, state: Array) -> _Window:
    """Decays and states of a window, from the state before it."""
    x, dt, coarse, fine, B, C = tokens
    scores = jnp.where(_causal(x.shape[-3]), _product(C, B, (-1, -1)), 0)[..., None, :, :]
    by_head = coarse.swapaxes(-1, -2)
    mixing = jnp.exp(jnp.minimum(by_head[..., :, None] - by_head[..., None, :], 0))

    from_start = jnp.exp(coarse) * jnp.exp(fine)
    to_end = jnp.exp(coarse[..., -1:, :] - coarse) * jnp.exp(fine[..., -1:, :] - fine)
    decay = jnp.repeat(from_start[..., -1:, :], x.shape[-1], axis=-1)
    added = _product(B, _channels((to_end * dt)[..., None] * x), (-2, -2))
    total_decay, ends = jax.lax.associative_scan(join, (decay, added), axis=1)
    ends += total_decay * state[:, None]
    starts = jnp.concatenate([state[:, None], ends[:, :-1]], axis=1)
    return _Window(scores, mixing, from_start, to_end, decay, starts, ends[:, -1])


def _window_backward(tokens: _Tokens, now: _Window, d_y: Array, d_end: Array) -> tuple[Array, tuple[Array, ...]]:
    """Cotangents of the state before the window, and of x (but for the skip), dt, log_decay, B and C."""
    x, dt, _, fine, B, C = tokens
    u = dt[..., None] * x

    # Through the states: of every chunk's end and, by the scan in reverse, of every chunk's start.
    from_outer = now.from_start[..., None] * d_y
    d_read = _product(C, _channels(from_outer), (-2, -2))
    total_decay, d_starts = jax.lax.associative_scan(join, (now.decay, d_read), axis=1, reverse=True)
    d_starts += total_decay * d_end[:, None]
    d_ends = jnp.concatenate([d_starts[:, 1:], d_end[:, None]], axis=1)
    d_u = now.to_end[..., None] * _product(B, d_ends).reshape(x.shape)
    d_log_to_end = _sum(u * d_u, -1)
    d_log_from_start = _sum(from_outer * _product(C, now.starts).reshape(x.shape), -1)
    d_decay = now.decay * _product(jnp.ones_like(C[..., :1, :]), now.starts * d_ends)
    d_log_decay = _sum(d_decay.reshape(*d_decay.shape[:-1], *x.shape[-2:]), -1)
    d_log_decay += jnp.cumsum(d_log_to_end, axis=-2) - d_log_to_end
    d_log_decay += jnp.flip(jnp.cumsum(jnp.flip(d_log_from_start, -2), axis=-2), -2)
    d_B = _product(_channels(now.to_end[..., None] * u), d_ends, (-1, -1))
    d_C = _product(_channels(from_outer), now.starts, (-1, -1))

    # Through the tokens of the same chunk; the fine part of the decays goes with the vectors.
    left, right = (_rows_swapped(a) for a in (jnp.exp(fine)[..., None] * d_y, jnp.exp(-fine)[..., None] * u))
    mixed = now.scores * now.mixing
    d_mixed = _product(left, right, (-1, -1))
    d_u += jnp.exp(-fine)[..., None] * _rows_swapped(_product(mixed, left, (-2, -2)))
    causal = _causal(x.shape[-3])
    d_scores = jnp.where(causal, _sum(d_mixed * now.mixing, -3), 0)
    d_B += _product(d_scores, C, (-2, -2))
    d_C += _product(d_scores, B)

    # log_decay k lies between s and l for s < k <= l: sums of nothing else, for differences would cancel.
    until = (d_mixed * mixed) @ jnp.where(causal, 0, jnp.ones((), x.dtype))
    d_log_decay += _sum(jnp.where(causal, until, 0), -2).swapaxes(-1, -2)

    return d_starts[:, 0], (dt[..., None] * d_u, _sum(x * d_u, -1), d_log_decay, d_B, d_C)


def _causal(size: int) -> Bool[Array, "l s"]:
    return jnp.tril(jnp.ones((size, size), bool))


def _rows_swapped(array: Float[Array, "*rest s r p"]) -> Float[Array, "*rest r s p"]:
    return array.swapaxes(-3, -2)


def _channels(array: Float[Array, "*rest r p"]) -> Float[Array, "*rest e"]:
    return array.reshape(*array.shape[:-2], -1)


def _product(a: Array, b: Array, axes: tuple[int, int] = (-1, -2)) -> Array:
    """Of matrices, over an axis of a and one of b, for each index before the last two."""
    contracting = (a.ndim + axes[0],), (b.ndim + axes[1],)
    batch = tuple(range(a.ndim - 2))
    return jax.lax.dot_general(a, b, (contracting, (batch, batch)))


def _sum(array: Array, axis: int) -> Array:
    """A sum over one axis, as a product with ones: XLA's own reductions are ten times slower on CPU."""
    return jnp.tensordot(array, jnp.ones(array.shape[axis], array.dtype), (axis, 0), precision="highest")


def _by_windows(x: Array, dt: Array, log_decay: Array, B: Array, C: Array, chunk_size: int, window: int) -> _Tokens:
    """All windows, stacked in front; padding has dt = log_decay = 0 and so changes nothing."""
    (b, t, h, p), g, wide = x.shape, B.shape[2], at_least_fp32(x.dtype)
    cut = partial(_windows, chunk_size=chunk_size, window=window)
    coarse, fine = split(log_decay.reshape(b, t, g, h // g))
    return _Tokens(
        cut(x.astype(wide).reshape(b, t, g, h // g, p)),
        cut(dt.astype(wide).reshape(b, t, g, h // g)),
        jnp.cumsum(cut(coarse), axis=4),
        jnp.cumsum(cut(fine), axis=4),
        cut(B.astype(wide)),
        cut(C.astype(wide)),
    )


def _windows(array: Float[Array, "b t g *rest"], chunk_size: int, window: int) -> Float[Array, "w b c g s *rest"]:
    """Filled up with zeros."""
    b, t, *rest = array.shape
    padded = jnp.pad(array, [(0, 0), (0, -t % (chunk_size * window))] + [(0, 0)] * len(rest))
    chunks = padded.reshape(b, -1, window, chunk_size, *rest)
    return jnp.moveaxis(chunks, (1, 4), (0, 3))


def _by_time(array: Float[Array, "w b c g s *rest"], length: int) -> Float[Array, "b t g *rest"]:
    _, b, _, g, _, *rest = array.shape
    return jnp.moveaxis(array, (0, 3), (1, 4)).reshape(b, -1, g, *rest)[:, :length]


def _state_by_groups(state: Float[Array, "b h p n"], g: int) -> Float[Array, "b g n e"]:
    b, _, _, n = state.shape
    return state.reshape(b, g, -1, n).swapaxes(-1, -2)


def _state_by_heads(state: Float[Array, "b g n e"], p: int) -> Float[Array, "b h p n"]:
    b, _, n, _ = state.shape
    return state.swapaxes(-1, -2).reshape(b, -1, p, n)
