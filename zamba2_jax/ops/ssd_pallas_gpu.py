"""The scan of Mamba2 on GPUs: Pallas kernels through Triton, forward and backward (arXiv:2405.21060, section 6).

Two kinds of kernel share the work:

- `_walk` carries the state, or its cotangent, over the chunks of a row. It is the only sequential part, so it does
  nothing but one matrix product per chunk, in parallel over rows, heads, slices of the head dim and, if need be,
  segments of a row. The state is float32 in registers; the copy left at each chunk has the dtype of x, as it is only
  read as an operand of products.
- `_outputs` and `_gradients` do all the rest, in parallel over rows, chunks and heads. A program takes a few heads of
  one group, one after the other: C B^T is formed once for them, and the gradients of B and C are summed over them in
  registers. What is left to sum over are a few partial sums per group.

No matrix between the tokens of a chunk ever reaches memory. Saved for the backward pass are the arguments and the
states at the chunks' starts, which the forward pass writes anyway.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from zamba2_jax.ops.decay import MAX_CHUNK, STEP
from zamba2_jax.ops.ssd_reference import join
from zamba2_jax.typing import Array, Float

Ref = Any
"""What a kernel reads from and writes to; Pallas has no public name for it."""

SMALLEST_TILE = 16
"""The least size of any side of a matrix product on tensor cores."""


@dataclass(frozen=True)
class Tuning:
    """What changes speed and memory, not the result.

    Attributes:
        chunk: tokens per chunk, a power of two from 16 to `ops.decay.MAX_CHUNK`.
        num_warps: warps per program of the forward pass.
        backward_warps: warps per program of the backward pass.
        num_stages: heads whose arrays are in flight or in use.
        walk_slice: channels p of a head per program that carries states, a power of two from 16.
        programs: how many programs fill a device, four for each of some 130 multiprocessors. With more of them to
            come, a program takes more heads, and a longer part of a row.
    """

    chunk: int = 64
    num_warps: int = 4
    backward_warps: int = 8
    num_stages: int = 2
    walk_slice: int = 32
    programs: int = 512


DEFAULTS = {jnp.dtype(jnp.bfloat16): Tuning(), jnp.dtype(jnp.float32): Tuning(chunk=32)}
"""By the dtype of x. Chunks of 64 float32 with n=128 take more shared memory than a multiprocessor has."""


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
        tuning: sizes of chunks and programs; by default those of `DEFAULTS`.

    Returns:
        y, in the dtype of x, and S after the last token, in float32.

    Raises:
        ValueError: the dtype of x is neither bfloat16 nor float32, h is not a multiple of g, or `tuning.chunk` is not
            a power of two in range.
    """
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    if x.dtype not in DEFAULTS:
        raise ValueError(f"x has dtype {x.dtype}: expected bfloat16 or float32")
    if h % g:
        raise ValueError(f"{h} heads do not divide into {g} groups")
    tuning = tuning or DEFAULTS[x.dtype]
    if tuning.chunk != _tile(tuning.chunk) or tuning.chunk > MAX_CHUNK:
        raise ValueError(f"chunk={tuning.chunk}: expected a power of two from {SMALLEST_TILE} to {MAX_CHUNK}")
    tuning = replace(tuning, chunk=min(tuning.chunk, _tile(t)))
    if initial_state is None:
        initial_state = jnp.zeros((b, h, p, n), jnp.float32)
    if D is None:
        D = jnp.zeros(h, jnp.float32)

    tokens, channels, states = (0, -t % tuning.chunk), (0, _tile(p) - p), (0, _tile(n) - n)
    y, final_state = _ssd(
        interpret,
        tuning,
        jnp.pad(x, ((0, 0), tokens, (0, 0), channels)),
        jnp.pad(jnp.moveaxis(dt, 1, 2), ((0, 0), (0, 0), tokens)),
        jnp.pad(jnp.moveaxis(log_decay, 1, 2), ((0, 0), (0, 0), tokens)),
        jnp.pad(B.astype(x.dtype), ((0, 0), tokens, (0, 0), states)),
        jnp.pad(C.astype(x.dtype), ((0, 0), tokens, (0, 0), states)),
        D,
        jnp.pad(initial_state, ((0, 0), (0, 0), channels, states)),
    )
    return y[:, :t, :, :p], final_state[..., :p, :n]


def _tile(size: int) -> int:
    return max(SMALLEST_TILE, pl.next_power_of_2(size))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ssd(
    interpret: bool,
    tuning: Tuning,
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b h t"],
    log_decay: Float[Array, "b h t"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    D: Float[Array, " h"],
    initial_state: Float[Array, "b h p n"],
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """The scan on whole chunks and whole tiles. Per token and head come last the tokens, so that loads are whole."""
    return _ssd_forward(interpret, tuning, x, dt, log_decay, B, C, D, initial_state)[0]


def _ssd_forward(
    interpret: bool, tuning: Tuning, x: Array, dt: Array, log_decay: Array, B: Array, C: Array, D: Array, state: Array
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    starts, final_state = _walk(x, dt, log_decay, B, state, reverse=False, tuning=tuning, interpret=interpret)
    y = _outputs(x, dt, log_decay, B, C, D, starts, tuning=tuning, interpret=interpret)
    return (y, final_state), (x, dt, log_decay, B, C, D, starts)


def _ssd_backward(
    interpret: bool, tuning: Tuning, saved: tuple[Array, ...], cotangents: tuple[Array, Array]
) -> tuple[Array, ...]:
    x, dt, log_decay, B, C, D, starts = saved
    dy, dfinal = cotangents
    dends, dinitial = _walk(dy, dt, log_decay, C, dfinal, reverse=True, tuning=tuning, interpret=interpret)
    dx, ddt, dlog_decay, dskip, dB, dC = _gradients(
        x, dt, log_decay, B, C, D, starts, dy, dends, tuning=tuning, interpret=interpret
    )
    dB, dC = (jnp.sum(partial_sums, axis=0).astype(x.dtype) for partial_sums in (dB, dC))
    return dx, ddt, dlog_decay, dB, dC, jnp.sum(dskip, axis=(0, 2)), dinitial


_ssd.defvjp(_ssd_forward, _ssd_backward)


# Inside kernels. l and s are positions in a chunk, as rows and as columns of a matrix.


class _Decays(NamedTuple):
    """What remains over stretches of a chunk of a head, each a product of decays."""

    from_start: Float[Array, " l"]
    to_end: Float[Array, " s"]
    whole: Float[Array, ""]
    between: Callable[[], Float[Array, "l s"]]
    """From s to l, and 0 where s > l. A function, as not every kernel has room for it."""


def _decays(log_decay: Float[Array, " s"]) -> _Decays:
    """See `ops.decay`: differences of sums are exact for the coarse part, and between small numbers for the fine."""
    coarse = jnp.floor(log_decay * (1 / STEP) + 0.5) * STEP  # `decay.split`, but for ties: round has no lowering
    fine = log_decay - coarse
    all_coarse, all_fine = jnp.sum(coarse), jnp.sum(fine)
    coarse, fine = jnp.cumsum(coarse), jnp.cumsum(fine)

    def between() -> Array:
        size = coarse.shape[0]
        exponent = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
        return jnp.exp(jnp.where(_causal(size), exponent, -jnp.inf))

    return _Decays(
        from_start=jnp.exp(coarse + fine),
        to_end=jnp.exp((all_coarse - coarse) + (all_fine - fine)),
        whole=jnp.exp(all_coarse + all_fine),
        between=between,
    )


def _causal(size: int) -> Array:
    """l >= s."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return row >= column


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


def _walk_kernel(
    rows_ref: Ref,
    dt_ref: Ref,
    log_decay_ref: Ref,
    projection_ref: Ref,
    first_ref: Ref,
    last_ref: Ref,
    states_ref: Ref | None = None,
    *,
    size: int,
    reverse: bool,
) -> None:
    chunks = rows_ref.shape[0] // size

    def step(i: Array, state: Array) -> Array:
        c = chunks - 1 - i if reverse else i
        if states_ref is not None:
            states_ref[c] = state.astype(states_ref.dtype)
        tokens = pl.ds(c * size, size)
        decays = _decays(log_decay_ref[tokens])
        weights = decays.from_start if reverse else decays.to_end * dt_ref[tokens]
        rows = rows_ref[tokens, :].astype(jnp.float32) * weights[:, None]
        added = _dot(rows.astype(rows_ref.dtype), projection_ref[tokens, :], (0, 0))
        return decays.whole * state + added

    last_ref[...] = jax.lax.fori_loop(0, chunks, step, first_ref[...])


def _outputs_kernel(
    x_ref: Ref, dt_ref: Ref, log_decay_ref: Ref, B_ref: Ref, C_ref: Ref, D_ref: Ref, starts_ref: Ref, y_ref: Ref
) -> None:
    C = C_ref[...]
    scores = _dot(C, B_ref[...], (1, 1))

    def head(i: Array, _: None) -> None:
        decays = _decays(log_decay_ref[i, :])
        x = x_ref[:, i, :]
        weights = scores * decays.between() * dt_ref[i, :][None, :]
        y = decays.from_start[:, None] * _dot(C, starts_ref[i], (1, 1))
        y += _dot(weights.astype(x.dtype), x)
        y += D_ref[i] * x.astype(jnp.float32)
        y_ref[:, i, :] = y.astype(y_ref.dtype)

    jax.lax.fori_loop(0, x_ref.shape[1], head, None)


def _gradients_kernel(
    x_ref: Ref,
    dt_ref: Ref,
    log_decay_ref: Ref,
    B_ref: Ref,
    C_ref: Ref,
    D_ref: Ref,
    starts_ref: Ref,
    dy_ref: Ref,
    dends_ref: Ref,
    dx_ref: Ref,
    ddt_ref: Ref,
    dlog_decay_ref: Ref,
    dskip_ref: Ref,
    dB_ref: Ref,
    dC_ref: Ref,
) -> None:
    dtype, size, heads = x_ref.dtype, B_ref.shape[0], x_ref.shape[1]
    scores = _dot(C_ref[...], B_ref[...], (1, 1))
    causal = _causal(size)
    earlier = jnp.where(causal, 0.0, 1.0).astype(dtype)  # [s, k]: s < k

    # Arrays are loaded where they are used, again if need be, and the largest terms come first: registers do not hold
    # what is live in any other order.
    def of_head(i: Array, dscores: Array) -> Array:
        dt, decays = dt_ref[i, :], _decays(log_decay_ref[i, :])
        between = decays.between()
        dscores_of_head = _dot(dy_ref[:, i, :], x_ref[:, i, :], (1, 1)) * (between * dt[None, :])

        # Token k's decay weighs all that goes from before k to k or after. Sums of just those terms: within the chunk,
        # then from its start to l >= k, from s < k to its end, and from its start to its end.
        within = _dot((dscores_of_head * scores).astype(dtype), earlier)  # [l, k]
        dlog_decay = jnp.sum(jnp.where(causal, within, 0.0), axis=0)

        du = _dot((scores * between).astype(dtype), dy_ref[:, i, :], (0, 0))  # of u = dt x, by this chunk
        later = decays.to_end[:, None] * _dot(B_ref[...], dends_ref[i], (1, 1))  # and by those that follow
        du += later
        x, dy = x_ref[:, i, :].astype(jnp.float32), dy_ref[:, i, :].astype(jnp.float32)
        ended = dt * jnp.sum(x * later, axis=1)
        ddt_ref[i, :] = jnp.sum(x * du, axis=1)
        dskip_ref[i, :] = jnp.sum(x * dy, axis=1)
        dx_ref[:, i, :] = (dt[:, None] * du + D_ref[i] * dy).astype(dx_ref.dtype)

        start, dy = starts_ref[i], dy_ref[:, i, :].astype(jnp.float32)
        started = decays.from_start * jnp.sum(dy * _dot(C_ref[...], start, (1, 1)), axis=1)
        dlog_decay += jnp.sum(jnp.where(causal, started[:, None], ended[:, None]), axis=0)
        through = decays.whole * jnp.sum(start.astype(jnp.float32) * dends_ref[i].astype(jnp.float32))
        dlog_decay_ref[i, :] = dlog_decay + through
        return dscores + dscores_of_head

    def of_states(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        dB, dC = sums
        decays = _decays(log_decay_ref[i, :])
        sent = x_ref[:, i, :].astype(jnp.float32) * (decays.to_end * dt_ref[i, :])[:, None]
        received = dy_ref[:, i, :].astype(jnp.float32) * decays.from_start[:, None]
        return dB + _dot(sent.astype(dtype), dends_ref[i]), dC + _dot(received.astype(dtype), starts_ref[i])

    # Two loops, as registers do not hold the sums of both.
    dscores = jax.lax.fori_loop(0, heads, of_head, jnp.zeros_like(scores)).astype(dtype)
    sums = _dot(dscores, C_ref[...], (0, 0)), _dot(dscores, B_ref[...])
    dB_ref[...], dC_ref[...] = jax.lax.fori_loop(0, heads, of_states, sums)


# Around kernels: grids and blocks.


def _walk(
    rows: Float[Array, "b t h p"],
    dt: Float[Array, "b h t"],
    log_decay: Float[Array, "b h t"],
    projection: Float[Array, "b t g n"],
    first: Float[Array, "b h p n"],
    *,
    reverse: bool,
    tuning: Tuning,
    interpret: bool,
) -> tuple[Float[Array, "b c h p n"], Float[Array, "b h p n"]]:
    """The state before every chunk and after all, from x and B; or its cotangent after every chunk and before all.

    The cotangent walks back, from dy and C. Where rows, heads and slices are too few to fill a device, a row is walked
    in segments: a first time for what each adds to the state, a second time from where the others left it.
    """
    (b, t, h, p), n = rows.shape, projection.shape[-1]
    segments = _segments(t // tuning.chunk, b * h * p // min(tuning.walk_slice, p), tuning.programs)
    walk = partial(_walk_segments, rows, dt, log_decay, projection, reverse=reverse, tuning=tuning, interpret=interpret)
    earliest = segments - 1 if reverse else 0
    firsts = jnp.zeros((b, segments, h, p, n), jnp.float32).at[:, earliest].set(first)
    if segments > 1:
        (ends,) = walk(firsts, states=False)
        decay = jnp.exp(jnp.sum(log_decay.reshape(b, h, segments, -1), axis=-1))
        _, ends = jax.lax.associative_scan(
            join, (jnp.moveaxis(decay, 1, 2)[..., None, None], ends), axis=1, reverse=reverse
        )
        before = [ends[:, 1:], first[:, None]] if reverse else [first[:, None], ends[:, :-1]]
        firsts = jnp.concatenate(before, axis=1)
    lasts, states = walk(firsts, states=True)
    return states, lasts[:, segments - 1 - earliest]


def _segments(chunks: int, walks: int, programs: int) -> int:
    """Into how many segments, of 4 chunks or more, to cut rows: up to twice as many walks as `programs`."""
    cuts = [cut for cut in range(2, chunks // 4 + 1) if chunks % cut == 0]
    return max((cut for cut in cuts if cut * walks <= 2 * programs), default=1)


def _walk_segments(
    rows: Float[Array, "b t h p"],
    dt: Float[Array, "b h t"],
    log_decay: Float[Array, "b h t"],
    projection: Float[Array, "b t g n"],
    firsts: Float[Array, "b m h p n"],
    *,
    states: bool,
    reverse: bool,
    tuning: Tuning,
    interpret: bool,
) -> tuple[Array, ...]:
    """The states at the end of m segments, each from its first; and, if asked for, those before every chunk."""
    (b, t, h, p), (g, n), m = rows.shape, projection.shape[2:], firsts.shape[1]
    size, heads, length, chunks = min(tuning.walk_slice, p), h // g, t // m, t // m // tuning.chunk
    per_token = pl.BlockSpec((None, None, length), lambda i, j, k: (i // m, j, i % m))
    end = pl.BlockSpec((None, None, None, size, n), lambda i, j, k: (i // m, i % m, j, k, 0))
    start = pl.BlockSpec((None, chunks, None, size, n), lambda i, j, k: (i // m, i % m, j, k, 0))
    return pl.pallas_call(
        partial(_walk_kernel, size=tuning.chunk, reverse=reverse),
        grid=(b * m, h, p // size),
        in_specs=[
            pl.BlockSpec((None, length, None, size), lambda i, j, k: (i // m, i % m, j, k)),
            per_token,
            per_token,
            pl.BlockSpec((None, length, None, n), lambda i, j, k: (i // m, i % m, j // heads, 0)),
            end,
        ],
        out_specs=[end, start][: 1 + states],
        out_shape=[
            jax.ShapeDtypeStruct(firsts.shape, jnp.float32),
            jax.ShapeDtypeStruct((b, m * chunks, h, p, n), rows.dtype),
        ][: 1 + states],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="ssd_walk_back" if reverse else "ssd_walk",
    )(rows, dt, log_decay, projection, firsts)


class _Blocks(NamedTuple):
    """The grid over rows, chunks and shares of a group's heads, and the block of every kind of array in a program."""

    grid: tuple[int, int, int]
    splits: int
    channels: pl.BlockSpec
    per_token: pl.BlockSpec
    projections: pl.BlockSpec
    per_head: pl.BlockSpec
    states: pl.BlockSpec
    sums: pl.BlockSpec
    """Partial sums of the gradients of B and C, [splits, b, t, g, n]."""


def _blocks(x: Array, B: Array, size: int, programs: int) -> _Blocks:
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    chunks = t // size
    share = _heads_per_program(h // g, b * chunks * g, programs)
    splits = h // g // share
    return _Blocks(
        grid=(b, chunks, g * splits),
        splits=splits,
        channels=pl.BlockSpec((None, size, share, p), lambda i, c, j: (i, c, j, 0)),
        per_token=pl.BlockSpec((None, share, size), lambda i, c, j: (i, j, c)),
        projections=pl.BlockSpec((None, size, None, n), lambda i, c, j: (i, c, j // splits, 0)),
        per_head=pl.BlockSpec((share,), lambda i, c, j: (j,)),
        states=pl.BlockSpec((None, None, share, p, n), lambda i, c, j: (i, c, j, 0, 0)),
        sums=pl.BlockSpec(
            (None, None, size, None, n),
            lambda i, c, j: (j % splits, i, c, j // splits, 0),
        ),
    )


def _heads_per_program(heads: int, groups: int, programs: int) -> int:
    """How many of a group's heads a program takes: many, so that few sums are left, but at least `programs` remain."""
    shares = [share for share in range(1, 17) if heads % share == 0]
    return max((share for share in shares if groups * heads // share >= programs), default=1)


def _outputs(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b h t"],
    log_decay: Float[Array, "b h t"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    D: Float[Array, " h"],
    starts: Float[Array, "b c h p n"],
    *,
    tuning: Tuning,
    interpret: bool,
) -> Float[Array, "b t h p"]:
    """y, from the states at the chunks' starts."""
    of = _blocks(x, B, tuning.chunk, tuning.programs)
    return pl.pallas_call(
        _outputs_kernel,
        grid=of.grid,
        in_specs=[of.channels, of.per_token, of.per_token, of.projections, of.projections, of.per_head, of.states],
        out_specs=of.channels,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tuning.num_warps, num_stages=tuning.num_stages),
        interpret=interpret,
        name="ssd_outputs",
    )(x, dt, log_decay, B, C, D, starts)


def _gradients(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b h t"],
    log_decay: Float[Array, "b h t"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    D: Float[Array, " h"],
    starts: Float[Array, "b c h p n"],
    dy: Float[Array, "b t h p"],
    dends: Float[Array, "b c h p n"],
    *,
    tuning: Tuning,
    interpret: bool,
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """dx, ddt, dlog_decay, dy . x per token and head, and partial sums of dB and dC."""
    of = _blocks(x, B, tuning.chunk, tuning.programs // 2)  # fewer fit at a time, and each leaves sums behind
    per_token = jax.ShapeDtypeStruct(dt.shape, jnp.float32)
    sums = jax.ShapeDtypeStruct((of.splits, *B.shape), jnp.float32)
    return pl.pallas_call(
        _gradients_kernel,
        grid=of.grid,
        in_specs=[
            of.channels,
            of.per_token,
            of.per_token,
            of.projections,
            of.projections,
            of.per_head,
            of.states,
            of.channels,
            of.states,
        ],
        out_specs=[of.channels, of.per_token, of.per_token, of.per_token, of.sums, of.sums],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), per_token, per_token, per_token, sums, sums],
        compiler_params=plgpu.CompilerParams(num_warps=tuning.backward_warps, num_stages=tuning.num_stages),
        interpret=interpret,
        name="ssd_gradients",
    )(x, dt, log_decay, B, C, D, starts, dy, dends)
