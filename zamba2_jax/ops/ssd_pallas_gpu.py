"""The scan of Mamba2 on GPUs: Pallas kernels through Triton, forward and backward (arXiv:2405.21060, section 6).

A row is walked chunk by chunk with the state in registers, float32, in parallel over rows, heads and, if these are
few, segments of a row:

- `ssd_decays` sums log decays along each chunk, once for all the others.
- `ssd_outputs` walks forward and does all of the forward pass: x is read once and y written once.
- `ssd_walk_back` walks backward and leaves the cotangent of the state at the end of every chunk.
- `ssd_gradients` does the rest of the backward pass, in parallel over chunks. A program takes a few heads of one group,
  one after the other, and sums the gradients of B and C over them in registers. What is left to sum over are a few
  partial sums per group.
- `ssd_walk` finds the states between segments, where there are any.

No matrix between the tokens of a chunk ever reaches memory. Saved for the backward pass are the arguments and the
states at the starts of chunks, in the dtype of x, as they are only read as operands of products.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from zamba2_jax.ops.decay import MAX_CHUNK, STEP
from zamba2_jax.ops.ssd_reference import join
from zamba2_jax.typing import Array, DTypeLike, Float

Ref = Any
"""What a kernel reads from and writes to; Pallas has no public name for it."""

SMALLEST_TILE = 16
"""The least size of any side of a matrix product on tensor cores."""
LONGEST_CHUNK = MAX_CHUNK // 2
"""Tokens over which sums of log decays are exact; half of what it is elsewhere, as those here are to the base of 2."""


@dataclass(frozen=True)
class Tuning:
    """What changes speed and memory, not the result.

    Attributes:
        chunk: tokens per chunk, a power of two from 16 to `LONGEST_CHUNK`.
        num_warps: warps per program.
        num_stages: chunks, or heads of a chunk, whose arrays are in flight or in use.
        multiprocessors: of the device. Rows are cut into segments where there are too few heads for all of them, and
            gradients are taken of as many heads per program as leave two programs to each.
    """

    chunk: int = 64
    num_warps: int = 4
    num_stages: int = 3
    multiprocessors: int = 132


def default_tuning(dtype: DTypeLike, n: int) -> Tuning:
    """Measured to be fastest on an H200, for x of this dtype and states of so many columns.

    With n=128 fewer arrays may be in flight, so that two programs fit a multiprocessor; chunks of 64 float32 take more
    shared memory than it has.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return Tuning(chunk=32, num_stages=2)
    return Tuning(num_stages=3 if n <= 64 else 2)


def ssd_pallas_gpu(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    log_decay: Float[Array, "b t h"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    D: Float[Array, " h"] | None,
    initial_state: Float[Array, "b h p n"] | None,
    *,
    interpret: bool = False,
    tuning: Tuning | None = None,
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """S_t = exp(log_decay_t) S_{t-1} + dt_t x_t B_t^T and y_t = S_t C_t + D x_t, for every head and all t.

    Differentiable once, in reverse, in every argument. Sums, decays and states are float32; matrix products have
    operands in the dtype of x, accumulate in float32, and are as exact as float32 for float32: never tf32.
    Any size goes: tokens are filled up to whole chunks, p and n to powers of two, with zeros.

    Args:
        x: input of the scan, bfloat16 or float32.
        dt: time step after softplus, float32; 0 at padding.
        log_decay: float32, in [-128, 0], as from `ops.decay.log_decays`; 0 at padding, -128 where a document starts.
        B, C: input and output projections of the state, in the dtype of x; head i uses group i // (h / g).
        D: weight of the skip connection, float32, or None.
        initial_state: S before the first token, float32; None for zeros.
        interpret: run in Python on any device, slowly, for tests.
        tuning: sizes of chunks and programs; `default_tuning` by default.

    Returns:
        y, in the dtype of x, and S after the last token, in float32.

    Raises:
        ValueError: the dtype of x is neither bfloat16 nor float32, h is not a multiple of g, or `tuning.chunk` is not
            a power of two in range.
    """
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"x has dtype {x.dtype}: expected bfloat16 or float32")
    if h % g:
        raise ValueError(f"{h} heads do not divide into {g} groups")
    tuning = tuning or default_tuning(x.dtype, n)
    if tuning.chunk != _tile(tuning.chunk) or tuning.chunk > LONGEST_CHUNK:
        raise ValueError(f"chunk={tuning.chunk}: expected a power of two from {SMALLEST_TILE} to {LONGEST_CHUNK}")
    tuning = replace(tuning, chunk=min(tuning.chunk, _tile(t)))
    if initial_state is None:
        initial_state = jnp.zeros((b, h, p, n), jnp.float32)
    if D is None:
        D = jnp.zeros(h, jnp.float32)

    tokens, channels, states = (0, -t % tuning.chunk), (0, _tile(p) - p), (0, _tile(n) - n)
    y, final_state = _ssd(
        _Kernels(tuning, interpret),
        jnp.pad(x, ((0, 0), tokens, (0, 0), channels)),
        jnp.pad(dt, ((0, 0), tokens, (0, 0))),
        jnp.pad(log_decay, ((0, 0), tokens, (0, 0))),
        jnp.pad(B.astype(x.dtype), ((0, 0), tokens, (0, 0), states)),
        jnp.pad(C.astype(x.dtype), ((0, 0), tokens, (0, 0), states)),
        D,
        jnp.pad(initial_state, ((0, 0), (0, 0), channels, states)),
    )
    return y[:, :t, :, :p], final_state[..., :p, :n]


def _tile(size: int) -> int:
    return max(SMALLEST_TILE, pl.next_power_of_2(size))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ssd(
    kernels: "_Kernels",
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    log_decay: Float[Array, "b t h"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    D: Float[Array, " h"],
    initial_state: Float[Array, "b h p n"],
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """The scan on whole chunks and whole tiles."""
    y, final_state = kernels.outputs(x, kernels.decays(dt, log_decay), B, C, D, initial_state, save=False)
    return y, final_state


def _ssd_forward(
    kernels: "_Kernels", x: Array, dt: Array, log_decay: Array, B: Array, C: Array, D: Array, initial_state: Array
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    decays = kernels.decays(dt, log_decay)
    y, final_state, starts = kernels.outputs(x, decays, B, C, D, initial_state, save=True)
    return (y, final_state), (x, dt, log_decay, B, C, D, starts)


def _ssd_backward(kernels: "_Kernels", saved: tuple[Array, ...], cotangents: tuple[Array, Array]) -> tuple[Array, ...]:
    x, dt, log_decay, B, C, D, starts = saved
    dy, dfinal = cotangents
    decays = kernels.decays(dt, log_decay)  # less to do again than to keep
    dends, dinitial = kernels.walk_back(dy, decays, C, dfinal)
    dx, *per_token, dB, dC = kernels.gradients(x, decays, B, C, D, starts, dy, dends)
    ddt, dlog_decay, dskip = (jnp.moveaxis(array, 1, 2) for array in per_token)
    dB, dC = (jnp.sum(partial_sums, axis=0).astype(x.dtype) for partial_sums in (dB, dC))
    return dx, ddt, dlog_decay, dB, dC, jnp.sum(dskip, axis=(0, 1)), dinitial


_ssd.defvjp(_ssd_forward, _ssd_backward)


class _Decays(NamedTuple):
    """How every head forgets along each chunk: arrays, or in a kernel references to blocks of them.

    From token s of a chunk to token l remains exp2(coarse_l - coarse_s) fine_l unfine_s; see `ops.decay`. Differences
    of `coarse` are exact, `fine` and its inverse are near 1. Powers of two are what a GPU computes. Tokens come last,
    so that loads are whole.
    """

    dt: Float[Array, "b h t"]
    coarse: Float[Array, "b h t"]
    fine: Float[Array, "b h t"]
    unfine: Float[Array, "b h t"]
    to_end: Float[Array, "b h t"]
    """What remains of each token at its chunk's end."""
    whole: Float[Array, "b c h"]
    """What remains of a chunk's start at its end."""

    def from_start(self, tokens: Any) -> Float[Array, " l"]:
        """In a kernel: what remains of the chunk's start at each token."""
        return jnp.exp2(self.coarse[tokens]) * self.fine[tokens]


REFS = len(_Decays._fields)


# Kernels. l and s are positions in a chunk. What is loaded for a product the compiler loads ahead of time; what is not,
# the loops carry along from the iteration before, or load first.


def _decays_kernel(dt_ref: Ref, log_decay_ref: Ref, *out_refs: Ref) -> None:
    to = _Decays(*out_refs)
    exponent = log_decay_ref[...] * math.log2(math.e)
    coarse = jnp.floor(exponent * (1 / STEP) + 0.5) * STEP  # `decay.split`, but for ties: round has no lowering
    fine = exponent - coarse
    all_coarse, all_fine = jnp.sum(coarse, axis=0), jnp.sum(fine, axis=0)
    coarse, fine = jnp.cumsum(coarse, axis=0), jnp.cumsum(fine, axis=0)
    to.dt[...] = dt_ref[...].T
    to.coarse[...] = coarse.T
    to.fine[...] = jnp.exp2(fine).T
    to.unfine[...] = jnp.exp2(-fine).T
    to.to_end[...] = jnp.exp2((all_coarse[None, :] - coarse) + (all_fine[None, :] - fine)).T
    to.whole[...] = jnp.exp2(all_coarse + all_fine)


def _walk_kernel(rows_ref: Ref, projection_ref: Ref, *refs: Ref, size: int, reverse: bool) -> None:
    decays, (first_ref, last_ref, *states_ref) = _Decays(*refs[:REFS]), refs[REFS:]
    chunks = rows_ref.shape[0] // size

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        state, whole = carry
        c = chunks - 1 - i if reverse else i
        next_whole = decays.whole[jnp.maximum(c - 1, 0) if reverse else jnp.minimum(c + 1, chunks - 1)]
        for ref in states_ref:
            ref[c] = state.astype(ref.dtype)
        tokens = pl.ds(c * size, size)
        weights = decays.from_start(tokens) if reverse else decays.to_end[tokens] * decays.dt[tokens]
        rows = rows_ref[tokens, :].astype(jnp.float32) * weights[:, None]
        added = _dot(rows.astype(rows_ref.dtype), projection_ref[tokens, :], (0, 0))
        return whole * state + added, next_whole

    carry = first_ref[...], decays.whole[chunks - 1 if reverse else 0]
    last_ref[...], _ = jax.lax.fori_loop(0, chunks, step, carry)


def _outputs_kernel(x_ref: Ref, B_ref: Ref, C_ref: Ref, D_ref: Ref, *refs: Ref, size: int) -> None:
    decays, (first_ref, y_ref, last_ref, *starts_ref) = _Decays(*refs[:REFS]), refs[REFS:]
    D, chunks, causal = D_ref[...], x_ref.shape[0] // size, _triangle(size)

    def step(c: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        state, whole = carry
        next_whole = decays.whole[jnp.minimum(c + 1, chunks - 1)]
        tokens = pl.ds(c * size, size)
        fine = decays.fine[tokens]
        x, B, C, dt = x_ref[tokens, :], B_ref[tokens, :], C_ref[tokens, :], decays.dt[tokens]
        coarse, start = decays.coarse[tokens], state.astype(x.dtype)
        for ref in starts_ref:
            ref[c] = start
        remains = jnp.exp2(jnp.where(causal, coarse[:, None] - coarse[None, :], -jnp.inf))
        weights = _dot(C, B, (1, 1)) * remains * (decays.unfine[tokens] * dt)[None, :]
        y = jnp.exp2(coarse)[:, None] * _dot(C, start, (1, 1)) + _dot(weights.astype(x.dtype), x)
        y = fine[:, None] * y + D * x.astype(jnp.float32)
        y_ref[tokens, :] = y.astype(y_ref.dtype)
        sent = x.astype(jnp.float32) * (decays.to_end[tokens] * dt)[:, None]
        return whole * state + _dot(sent.astype(x.dtype), B, (0, 0)), next_whole

    last_ref[...], _ = jax.lax.fori_loop(0, chunks, step, (first_ref[...], decays.whole[0]))


def _gradients_kernel(
    x_ref: Ref, B_ref: Ref, C_ref: Ref, D_ref: Ref, starts_ref: Ref, dy_ref: Ref, dends_ref: Ref, *refs: Ref
) -> None:
    decays, (dx_ref, ddt_ref, dlog_decay_ref, dskip_ref, dB_ref, dC_ref) = _Decays(*refs[:REFS]), refs[REFS:]
    dtype, size, heads, B, C = x_ref.dtype, B_ref.shape[0], x_ref.shape[1], B_ref[...], C_ref[...]
    # Matrices between tokens have s along rows and l along columns, so that a sum over l stays within a warp.
    scores, causal = _dot(B, C, (1, 1)), _triangle(size, upper=True)
    earlier = jnp.where(causal, 0.0, 1.0).astype(dtype)  # [k, s]: s < k

    def ahead(i: Array | int) -> tuple[Array, ...]:
        return decays.dt[i, :], decays.to_end[i, :], D_ref[i], decays.whole[i]

    def of_head(i: Array, carry: tuple[Array, tuple[Array, ...]]) -> tuple[Array, tuple[Array, ...]]:
        dscores, (dt, to_end, D, whole) = carry
        x, dy, dend = x_ref[:, i, :], dy_ref[:, i, :], dends_ref[i]
        coarse, fine, unfine = decays.coarse[i, :], decays.fine[i, :], decays.unfine[i, :]
        remains = jnp.exp2(jnp.where(causal, coarse[None, :] - coarse[:, None], -jnp.inf)) * fine[None, :]
        dscores_of_head = _dot(x, dy, (1, 1)) * remains * (unfine * dt)[:, None]

        # Token k's decay weighs all that goes from before k to k or after. Sums of just those terms: within the chunk,
        # then from its start to l >= k, from s < k to its end, and from its start to its end.
        within = _dot(earlier, (dscores_of_head * scores).astype(dtype))  # [k, l]

        du = unfine[:, None] * _dot((scores * remains).astype(dtype), dy)  # of u = dt x, by this chunk
        later = to_end[:, None] * _dot(B, dend, (1, 1))  # and by those that follow
        du += later
        x, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
        ended = dt * jnp.sum(x * later, axis=1)
        ddt_ref[i, :] = jnp.sum(x * du, axis=1)
        dskip_ref[i, :] = jnp.sum(x * dy, axis=1)
        dx_ref[:, i, :] = (dt[:, None] * du + D * dy).astype(dx_ref.dtype)

        start = starts_ref[i]
        started = jnp.exp2(coarse) * fine * jnp.sum(dy * _dot(C, start, (1, 1)), axis=1)
        through = whole * jnp.sum(start.astype(jnp.float32) * dend.astype(jnp.float32))
        over = jnp.where(causal, within + started[None, :], ended[None, :])
        dlog_decay_ref[i, :] = jnp.sum(over, axis=1) + through
        return dscores + dscores_of_head, ahead(jnp.minimum(i + 1, heads - 1))

    def of_states(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        dB, dC = sums
        sent = x_ref[:, i, :].astype(jnp.float32) * (decays.to_end[i, :] * decays.dt[i, :])[:, None]
        received = dy_ref[:, i, :].astype(jnp.float32) * decays.from_start((i, slice(None)))[:, None]
        return dB + _dot(sent.astype(dtype), dends_ref[i]), dC + _dot(received.astype(dtype), starts_ref[i])

    # Two loops, as registers do not hold the sums of both.
    dscores, _ = jax.lax.fori_loop(0, heads, of_head, (jnp.zeros_like(scores), ahead(0)))
    dscores = dscores.astype(dtype)
    sums = _dot(dscores, C), _dot(dscores, B, (0, 0))
    dB_ref[...], dC_ref[...] = jax.lax.fori_loop(0, heads, of_states, sums)


def _triangle(size: int, *, upper: bool = False) -> Array:
    """[l, s]: l >= s; with `upper` [s, l]."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return row <= column if upper else row >= column


def _dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """The product over axis `contract[0]` of a and `contract[1]` of b, in float32.

    As exact as float32 for float32: Triton's own float32 product keeps whole operands in registers, far too few, so
    each operand is three of bfloat16, and of their nine products only those below a rounding are left out.
    """
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6 if a.dtype == jnp.float32 else jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


@dataclass(frozen=True)
class _Kernels:
    """The kernels as functions of arrays: their grids, and the blocks of a program."""

    tuning: Tuning
    interpret: bool

    def decays(self, dt: Float[Array, "b t h"], log_decay: Float[Array, "b t h"]) -> _Decays:
        """What the other kernels read of dt and decays."""
        (b, t, h), chunk = dt.shape, self.tuning.chunk
        share, per_token = math.gcd(h, 16), jax.ShapeDtypeStruct((b, h, t), jnp.float32)
        given = pl.BlockSpec((None, chunk, share), lambda i, c, j: (i, c, j))
        turned = pl.BlockSpec((None, share, chunk), lambda i, c, j: (i, j, c))
        whole = pl.BlockSpec((None, None, share), lambda i, c, j: (i, c, j))
        call = self._call(
            "ssd_decays",
            _decays_kernel,
            grid=(b, t // chunk, h // share),
            in_specs=[given, given],
            out_specs=[*[turned] * (REFS - 1), whole],
            out_shape=[*[per_token] * (REFS - 1), jax.ShapeDtypeStruct((b, t // chunk, h), jnp.float32)],
        )
        return _Decays(*call(dt, log_decay))

    def outputs(
        self,
        x: Float[Array, "b t h p"],
        decays: _Decays,
        B: Float[Array, "b t g n"],
        C: Float[Array, "b t g n"],
        D: Float[Array, " h"],
        initial_state: Float[Array, "b h p n"],
        *,
        save: bool,
    ) -> list[Array]:
        """y, the last state and, to `save`, the states at the starts of chunks, [b, c, h, p, n] in the dtype of x."""
        firsts = self._firsts(x, decays, B, initial_state, reverse=False)
        of, per_head = _walk_blocks(x, B, firsts, self.tuning.chunk), pl.BlockSpec((None,), lambda i, j: (j,))
        y, lasts, *starts = self._call(
            "ssd_outputs",
            partial(_outputs_kernel, size=self.tuning.chunk),
            grid=of.grid,
            in_specs=[of.rows, of.projection, of.projection, per_head, *of.decays, of.end],
            out_specs=[of.rows, of.end, of.states][: 2 + save],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), of.all_ends, of.all_states][: 2 + save],
        )(x, B, C, D, *decays, firsts)
        return [y, lasts[:, -1], *starts]

    def walk_back(
        self,
        dy: Float[Array, "b t h p"],
        decays: _Decays,
        C: Float[Array, "b t g n"],
        dfinal: Float[Array, "b h p n"],
    ) -> tuple[Float[Array, "b c h p n"], Float[Array, "b h p n"]]:
        """The cotangent of the state after every chunk, in the dtype of dy, and before all, in float32."""
        firsts = self._firsts(dy, decays, C, dfinal, reverse=True)
        lasts, dends = self._walk(dy, decays, C, firsts, states=True, reverse=True)
        return dends, lasts[:, 0]

    def _firsts(
        self, rows: Array, decays: _Decays, projection: Array, first: Array, *, reverse: bool
    ) -> Float[Array, "b m h p n"]:
        """The state where a walk enters each of m segments of a row; where it enters the row it is `first`.

        A row is cut where there are too few of them to fill a device. Each segment is walked once more for that.
        """
        b, chunks, h = decays.whole.shape
        m = _segments(chunks, b * h, self.tuning.multiprocessors)
        if m == 1:
            return first[:, None]
        known = jnp.zeros((b, m, *first.shape[1:]), jnp.float32).at[:, m - 1 if reverse else 0].set(first)
        (ends,) = self._walk(rows, decays, projection, known, states=False, reverse=reverse)
        decay = jnp.prod(decays.whole.reshape(b, m, chunks // m, h), axis=2)[..., None, None]
        _, ends = jax.lax.associative_scan(join, (decay, ends), axis=1, reverse=reverse)
        before = [ends[:, 1:], first[:, None]] if reverse else [first[:, None], ends[:, :-1]]
        return jnp.concatenate(before, axis=1)

    def _walk(
        self,
        rows: Float[Array, "b t h p"],
        decays: _Decays,
        projection: Float[Array, "b t g n"],
        firsts: Float[Array, "b m h p n"],
        *,
        states: bool,
        reverse: bool,
    ) -> Sequence[Array]:
        """The states at the end of m segments, each from its first; and, if asked for, those before every chunk.

        With `reverse` from the end to the start, from dy and C to cotangents.
        """
        of = _walk_blocks(rows, projection, firsts, self.tuning.chunk)
        return self._call(
            "ssd_walk_back" if reverse else "ssd_walk",
            partial(_walk_kernel, size=self.tuning.chunk, reverse=reverse),
            grid=of.grid,
            in_specs=[of.rows, of.projection, *of.decays, of.end],
            out_specs=[of.end, of.states][: 1 + states],
            out_shape=[of.all_ends, of.all_states][: 1 + states],
            num_stages=3,
        )(rows, projection, *decays, firsts)

    def gradients(
        self,
        x: Float[Array, "b t h p"],
        decays: _Decays,
        B: Float[Array, "b t g n"],
        C: Float[Array, "b t g n"],
        D: Float[Array, " h"],
        starts: Float[Array, "b c h p n"],
        dy: Float[Array, "b t h p"],
        dends: Float[Array, "b c h p n"],
    ) -> Sequence[Array]:
        """dx, then ddt, dlog_decay and dy . x, all [b, h, t], then partial sums of dB and dC, [splits, b, t, g, n]."""
        (b, t, h, p), (g, n), chunk = x.shape, B.shape[2:], self.tuning.chunk
        share = _heads_per_program(h // g, b * t // chunk * g, 2 * self.tuning.multiprocessors)
        splits = h // g // share
        channels = pl.BlockSpec((None, chunk, share, p), lambda i, c, j: (i, c, j, 0))
        per_token = pl.BlockSpec((None, share, chunk), lambda i, c, j: (i, j, c))
        decays_of_heads = [*[per_token] * (REFS - 1), pl.BlockSpec((None, None, share), lambda i, c, j: (i, c, j))]
        per_head = pl.BlockSpec((share,), lambda i, c, j: (j,))
        projection = pl.BlockSpec((None, chunk, None, n), lambda i, c, j: (i, c, j // splits, 0))
        states = pl.BlockSpec((None, None, share, p, n), lambda i, c, j: (i, c, j, 0, 0))
        sums = pl.BlockSpec((None, None, chunk, None, n), lambda i, c, j: (j % splits, i, c, j // splits, 0))
        all_sums, all_tokens = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((splits, *B.shape), (b, h, t)))
        return self._call(
            "ssd_gradients",
            _gradients_kernel,
            grid=(b, t // chunk, g * splits),
            in_specs=[channels, projection, projection, per_head, states, channels, states, *decays_of_heads],
            out_specs=[channels, *[per_token] * 3, sums, sums],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), *[all_tokens] * 3, all_sums, all_sums],
        )(x, B, C, D, starts, dy, dends, *decays)

    def _call(
        self, name: str, kernel: Callable[..., None], *, num_stages: int | None = None, **shapes: Any
    ) -> Callable[..., Sequence[Array]]:
        stages = num_stages or self.tuning.num_stages
        params = plgpu.CompilerParams(num_warps=self.tuning.num_warps, num_stages=stages)
        return pl.pallas_call(kernel, name=name, interpret=self.interpret, compiler_params=params, **shapes)


class _WalkBlocks(NamedTuple):
    """The grid over segments and heads, the block of every kind of array in a program, and the shapes of all states."""

    grid: tuple[int, int]
    rows: pl.BlockSpec
    projection: pl.BlockSpec
    decays: list[pl.BlockSpec]
    end: pl.BlockSpec
    states: pl.BlockSpec
    all_ends: jax.ShapeDtypeStruct
    all_states: jax.ShapeDtypeStruct


def _walk_blocks(
    rows: Float[Array, "b t h p"], projection: Float[Array, "b t g n"], firsts: Float[Array, "b m h p n"], chunk: int
) -> _WalkBlocks:
    (b, t, h, p), (g, n), m = rows.shape, projection.shape[2:], firsts.shape[1]
    length, chunks, heads = t // m, t // m // chunk, h // g
    per_token = pl.BlockSpec((None, None, length), lambda i, j: (i // m, j, i % m))
    return _WalkBlocks(
        grid=(b * m, h),
        rows=pl.BlockSpec((None, length, None, p), lambda i, j: (i // m, i % m, j, 0)),
        projection=pl.BlockSpec((None, length, None, n), lambda i, j: (i // m, i % m, j // heads, 0)),
        decays=[*[per_token] * (REFS - 1), pl.BlockSpec((None, chunks, None), lambda i, j: (i // m, i % m, j))],
        end=pl.BlockSpec((None, None, None, p, n), lambda i, j: (i // m, i % m, j, 0, 0)),
        states=pl.BlockSpec((None, chunks, None, p, n), lambda i, j: (i // m, i % m, j, 0, 0)),
        all_ends=jax.ShapeDtypeStruct(firsts.shape, jnp.float32),
        all_states=jax.ShapeDtypeStruct((b, t // chunk, h, p, n), rows.dtype),
    )


def _segments(chunks: int, walks: int, multiprocessors: int) -> int:
    """Into how many segments, of 4 chunks or more, to cut rows: as many as leave up to two walks a multiprocessor.

    Where four fifths of them have a walk, a second pass over x costs more than it gains.
    """
    if 5 * walks >= 4 * multiprocessors:
        return 1
    cuts = [cut for cut in range(2, chunks // 4 + 1) if chunks % cut == 0]
    return max((cut for cut in cuts if cut * walks <= 2 * multiprocessors), default=1)


def _heads_per_program(heads: int, groups: int, programs: int) -> int:
    """How many of a group's heads a program takes: many, so that few sums are left, but at least `programs` remain."""
    shares = [share for share in range(1, 17) if heads % share == 0]
    return max((share for share in shares if groups * heads // share >= programs), default=1)
