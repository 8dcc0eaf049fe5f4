"""The scan of Mamba2 (arXiv:2405.21060, section 6) as two TPU kernels, forward and backward, in one pass each.

The grid is (row, step of time, block of heads), the last axis fastest. The states of all heads stay in VMEM while a
row goes by, so that x, y, B, C, dt and the decays cross the memory bus once, whatever the number of heads. The backward
kernel walks back in time from the states that the forward kernel saved at the start of every step.

Layout. The TPU keeps an array in tiles of 128 lanes, to which it would pad 64 channels. So arrays reach the kernels
with their last axis as wide as it can be: x as [b, t, h p], dt as [b, h, t], and states of n = 64 folded, two channels
side by side, [b, h p / 2, 2 n]. In VMEM a state is transposed, [n, h p], so that every matrix product has 128 channels
in its lanes: one head of 128, two of 64 and so on, here called a unit. What differs from head to head is stacked,
[M1 M2] [x masked to head 1; x masked to head 2], which costs the matrix unit no more than two products with 64 lanes
would.

Numbers per head and token are kept twice in VMEM: as columns (tokens in sublanes), to scale rows of x, and as rows
(tokens in lanes), to scale columns of a chunk's [l, s] matrices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from zamba2_jax.ops.decay import split
from zamba2_jax.typing import Array, DTypeLike, Float

LANES = 128
CHUNK = 128
"""Tokens per chunk: as many as the lanes, so that the matrices of a chunk have no padding."""

MAX_TOKENS, MAX_CHANNELS = 512, 1024
"""Of a step of the grid: blocks of a megabyte in bfloat16, and 16 heads of unrolled code."""

VMEM_BYTES = 32 * 2**20
"""What a kernel may use, of 128 MiB (v5e, v6e) or 64 (v5p). The 16 that v5e allows by default are one too few."""

NN, NT, TN = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))
"""Axes that a matrix product sums over: A B, A B^T and A^T B."""

# Names of numbers per head and token. hi and lo are the parts, by `ops.decay.split`, of the sum of log decays from the
# start of the chunk to the token; `from_start` is the exponential of that, and `to_end` that of the rest of the chunk.
COLUMNS = ("hi", "lo", "dt_to_end")
ROWS = ("hi", "dt", "exp_minus_lo", "from_start", "to_end")


class Tiling(NamedTuple):
    """How the work is cut.

    Attributes:
        chunk: tokens per chunk.
        chunks: chunks per step of the grid; a training pass saves one state per step.
        heads: heads per step of the grid, of the same group.
    """

    chunk: int
    chunks: int
    heads: int


class Sizes(NamedTuple):
    """Sizes of padded arguments, and how they are cut."""

    b: int
    t: int
    h: int
    p: int
    g: int
    n: int
    tiling: Tiling

    @property
    def tokens(self) -> int:
        """Tokens per step of the grid."""
        return self.tiling.chunk * self.tiling.chunks

    @property
    def steps(self) -> int:
        """Steps of the grid along time."""
        return self.t // self.tokens

    @property
    def blocks(self) -> int:
        """Steps of the grid along heads."""
        return self.h // self.tiling.heads

    @property
    def blocks_per_group(self) -> int:
        """Steps of the grid along the heads of one group."""
        return self.blocks // self.g

    @property
    def channels(self) -> int:
        """Channels of the heads of a step."""
        return self.tiling.heads * self.p

    @property
    def fold(self) -> int:
        """Channels whose states lie side by side in main memory, so as to fill the lanes."""
        return LANES // self.n if LANES % self.n == 0 else 1

    def folded(self, channels: int) -> tuple[int, int]:
        """Shape in main memory of the states of so many channels."""
        return channels // self.fold, self.fold * self.n

    @property
    def unit(self) -> int:
        """Channels of a matrix product."""
        return max(LANES, self.p)

    @property
    def unit_heads(self) -> int:
        """Heads of a matrix product."""
        return self.unit // self.p


class Inputs(NamedTuple):
    """Arguments as the kernels want them, their cotangents, or references to blocks of either.

    x [b, t, h p], dt and log_decay [b, h, t], B and C [b, t, g n], and D, once per channel, [1, h p].
    """

    x: Any
    dt: Any
    log_decay: Any
    B: Any
    C: Any
    D: Any


class Scratch(NamedTuple):
    """References to VMEM that outlives a step of the grid.

    The state or its cotangent and `COLUMNS` and `ROWS` for every block of heads; B, C and their scores for a group.
    """

    state: Any  # [block, n, channel]
    turned: Any  # [channel, n], a state on its way from or to main memory
    columns: Any  # [block, t, (name, head)]
    rows: Any  # [block, name, head, t]
    B: Any  # [t, n]
    C: Any  # [t, n]
    scores: Any  # [chunk, l, s]


class Sums(NamedTuple):
    """References to what the backward kernel adds up, and to the states at the starts of a step's chunks."""

    starts: Any  # [chunk, n, channel]
    D: Any  # [block, 1, channel]
    B: Any  # [t, n]
    C: Any  # [t, n]
    scores: Any  # [chunk, l, s]
    heads: Any  # [name of HeadSums, block, head, t]


class HeadSums(NamedTuple):
    """Terms of dt's and the log decay's cotangents, [head, t].

    The cotangent of the log decay of token k is `within` + the sum of `reads` from k on + that of `writes` before k.
    """

    dt: Any
    within: Any
    reads: Any
    writes: Any


class UnitGradients(NamedTuple):
    """What the heads of one unit in one chunk give to the cotangents of all that they read."""

    x: Array
    B: Array
    C: Array
    scores: Array
    state: Array
    D: Array
    heads: HeadSums


def ssd_pallas_tpu(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    log_decay: Float[Array, "b t h"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    D: Float[Array, " h"] | None,
    initial_state: Float[Array, "b h p n"] | None,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """S_t = exp(log_decay_t) S_{t-1} + dt_t x_t B_t^T and y_t = S_t C_t + D x_t, for every head and all t.

    Differentiable once, in reverse, in every argument. Matrix products take the dtype of x and accumulate in float32;
    all else is float32.

    Args:
        x: input of the scan, bfloat16 or float32.
        dt: time step after softplus, float32; 0 at padding.
        log_decay: from `ops.decay.log_decays`, float32, in [-128, 0].
        B, C: input and output projections of the state, in the dtype of x; head i uses group i // (h / g).
        D: weight of the skip connection, float32; none by default.
        initial_state: S before the first token, float32; zeros by default.
        interpret: runs the kernels on any platform, slowly.

    Returns:
        y, in the dtype of x, and S after the last token, in float32.

    Raises:
        ValueError: x is neither bfloat16 nor float32.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"x has dtype {x.dtype}, expected bfloat16 or float32")
    tiling = choose_tiling(x.shape, B.shape, x.dtype)
    return tiled_ssd(x, dt, log_decay, B, C, D, initial_state, tiling=tiling, interpret=interpret)


def choose_tiling(x_shape: tuple[int, ...], B_shape: tuple[int, ...], dtype: DTypeLike) -> Tiling:
    """Steps so long that the states saved and read by a training pass have a third of the bytes of x, dy and dx."""
    (_, t, h, p), (g, n) = x_shape, B_shape[2:]
    p, unit_heads = _pad_head(p)
    tokens = min(8 * n // jnp.dtype(dtype).itemsize, MAX_TOKENS, t)
    units = pl.cdiv(h // g, unit_heads)
    fitting = [u for u in range(1, units + 1) if units % u == 0 and u * unit_heads * p <= max(MAX_CHANNELS, p)]
    return Tiling(CHUNK, max(1, tokens // CHUNK), fitting[-1] * unit_heads)


def tiled_ssd(
    x: Array,
    dt: Array,
    log_decay: Array,
    B: Array,
    C: Array,
    D: Array | None,
    initial_state: Array | None,
    *,
    tiling: Tiling,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """`ssd_pallas_tpu` cut by `tiling`: fills up heads, channels, state and time to whole tiles, with zeros."""
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    r = h // g
    padded_t, padded_h = _up(t, tiling.chunk * tiling.chunks), g * _up(r, tiling.heads)
    s = Sizes(b, padded_t, padded_h, _pad_head(p)[0], g, _up(n, 16), tiling)

    def per_head(array: Array, before: list[int], after: list[int]) -> Array:
        """Pads the axes `before` that of heads, it, and those `after` it, to the given sizes."""
        axis = len(before)
        grouped = array.reshape(*array.shape[:axis], g, r, *array.shape[axis + 1 :])
        return _pad(grouped, [*before, g, s.h // g, *after]).reshape(*before, s.h, *after)

    def per_group(array: Array) -> Array:
        return _pad(array, [b, s.t, g, s.n]).reshape(b, s.t, g * s.n)

    inputs = Inputs(
        per_head(x, [b, s.t], [s.p]).reshape(b, s.t, s.h * s.p),
        per_head(dt, [b, s.t], []).swapaxes(1, 2),
        per_head(log_decay, [b, s.t], []).swapaxes(1, 2),
        per_group(B),
        per_group(C),
        jnp.repeat(per_head(jnp.zeros(h, jnp.float32) if D is None else D, [], []), s.p)[None],
    )
    first: tuple[Array, ...] = ()
    if initial_state is not None:
        first = (_reshape_state(s, per_head(initial_state, [b], [s.p, s.n]), b, *s.folded(s.h * s.p)),)
    y, last = _scan(inputs, first, s, interpret)
    y = y.reshape(b, s.t, g, s.h // g, s.p)[:, :t, :, :r, :p].reshape(b, t, h, p)
    last = _reshape_state(s, last, b, g, s.h // g, s.p, s.n)
    return y, last[:, :, :r, :p, :n].reshape(b, h, p, n)


def _reshape_state(s: Sizes, state: Array, *shape: int) -> Array:
    """A state with its channels folded, or unfolded."""
    # docs/xla-notes.md: folded-states-on-v5p
    return jax.lax.optimization_barrier(state.reshape(s.b, s.h, *s.folded(s.p))).reshape(shape)


def _pad_head(p: int) -> tuple[int, int]:
    """Channels such that a whole number of heads fills the lanes, or a head a multiple of them; and that number."""
    padded = max(8, pl.next_power_of_2(p)) if p <= LANES else _up(p, LANES)
    return padded, max(1, LANES // padded)


def _up(size: int, multiple: int) -> int:
    return pl.cdiv(size, multiple) * multiple


def _pad(array: Array, shape: list[int]) -> Array:
    return jnp.pad(array, [(0, padded - size) for padded, size in zip(shape, array.shape, strict=True)])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _scan(inputs: Inputs, first: tuple[Array, ...], s: Sizes, interpret: bool) -> tuple[Array, Array]:
    """y [b, t, h p] and the last state, `Sizes.folded`; `first` is the initial state, if there is one."""
    y, last, _ = _forward(inputs, first, s, interpret, save=False)
    return y, last


def _scan_forward(
    inputs: Inputs, first: tuple[Array, ...], s: Sizes, interpret: bool
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    y, last, saved = _forward(inputs, first, s, interpret, save=True)
    return (y, last), (inputs, saved, bool(first))


def _scan_backward(
    s: Sizes, interpret: bool, residuals: tuple[Any, ...], cotangents: tuple[Array, Array]
) -> tuple[Inputs, tuple[Array, ...]]:
    inputs, saved, initial = residuals
    gradients, dfirst = _backward(inputs, saved, initial, cotangents, s, interpret)
    return gradients._replace(D=gradients.D.sum(0)), dfirst


_scan.defvjp(_scan_forward, _scan_backward)


def _forward(
    inputs: Inputs, first: tuple[Array, ...], s: Sizes, interpret: bool, *, save: bool
) -> tuple[Array, Array, tuple[Array, ...]]:
    """y, the last state, and with `save` the states at the start of every step, [b, step, n, h p]."""
    blocks = _blocks(s, lambda c: c)
    return pl.pallas_call(
        partial(_forward_kernel, s),
        grid=(s.b, s.steps, s.blocks),
        in_specs=[_input_blocks(blocks), (blocks["first"],) * len(first)],
        out_specs=(blocks["channels"], blocks["last"], (blocks["saved"],) * save),
        out_shape=(
            jax.ShapeDtypeStruct(inputs.x.shape, inputs.x.dtype),
            jax.ShapeDtypeStruct((s.b, *s.folded(s.h * s.p)), jnp.float32),
            (jax.ShapeDtypeStruct((s.b, s.steps, s.n, s.h * s.p), jnp.float32),) * save,
        ),
        scratch_shapes=[_scratch(s, inputs.x.dtype)],
        compiler_params=_COMPILER_PARAMS,
        interpret=interpret,
        name="ssd_forward",
    )(inputs, first)


def _backward(
    inputs: Inputs,
    saved: tuple[Array, ...],
    initial: bool,
    cotangents: tuple[Array, Array],
    s: Sizes,
    interpret: bool,
) -> tuple[Inputs, tuple[Array, ...]]:
    """Cotangents of the inputs, D's for each row apart, [b, 1, h p], and of the initial state, if there is one."""
    blocks = _blocks(s, lambda c: s.steps - 1 - c)
    D = jax.ShapeDtypeStruct((s.b, 1, s.h * s.p), jnp.float32)
    return pl.pallas_call(
        partial(_backward_kernel, s),
        grid=(s.b, s.steps, s.blocks),
        in_specs=[_input_blocks(blocks), (blocks["saved"],), (blocks["channels"], blocks["first"])],
        out_specs=(_input_blocks(blocks)._replace(D=blocks["D_sum"]), (blocks["last"],) * initial),
        out_shape=(
            Inputs(*(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in inputs))._replace(D=D),
            (jax.ShapeDtypeStruct((s.b, *s.folded(s.h * s.p)), jnp.float32),) * initial,
        ),
        scratch_shapes=[_scratch(s, inputs.x.dtype), _sums(s)],
        compiler_params=_COMPILER_PARAMS,
        interpret=interpret,
        name="ssd_backward",
    )(inputs, saved, cotangents)


_COMPILER_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
)


def _blocks(s: Sizes, time: Callable[[Any], Any]) -> dict[str, pl.BlockSpec]:
    """What a step of the grid holds of each kind of array, `time(c)` being the place in time of step c.

    A block is transferred when its index changes: B, C and the numbers per head once for all blocks of heads. States at
    the ends of a row are read in the first step and written in the last; in the others, their index rests.
    """

    def first(b: Any, c: Any, j: Any) -> tuple[Any, ...]:
        return b, jnp.where(c == 0, j, s.blocks - 1), 0

    def last(b: Any, c: Any, j: Any) -> tuple[Any, ...]:
        return b, jnp.where(c == s.steps - 1, j, 0), 0

    def last_sum(b: Any, c: Any, j: Any) -> tuple[Any, ...]:
        return b, 0, jnp.where(c == s.steps - 1, j, 0)

    return {
        "channels": pl.BlockSpec((1, s.tokens, s.channels), lambda b, c, j: (b, time(c), j)),
        "heads": pl.BlockSpec((1, s.h, s.tokens), lambda b, c, j: (b, 0, time(c))),
        "groups": pl.BlockSpec((1, s.tokens, s.g * s.n), lambda b, c, j: (b, time(c), 0)),
        "D": pl.BlockSpec((1, s.channels), lambda b, c, j: (0, j)),
        "D_sum": pl.BlockSpec((1, 1, s.channels), last_sum),
        "saved": pl.BlockSpec((1, 1, s.n, s.channels), lambda b, c, j: (b, time(c), 0, j)),
        "first": pl.BlockSpec((1, *s.folded(s.channels)), first),
        "last": pl.BlockSpec((1, *s.folded(s.channels)), last),
    }


def _input_blocks(blocks: dict[str, pl.BlockSpec]) -> Inputs:
    return Inputs(*(blocks[name] for name in ("channels", "heads", "heads", "groups", "groups", "D")))


def _scratch(s: Sizes, dtype: jnp.dtype) -> Scratch:
    size, chunks, heads = s.tiling
    return Scratch(
        state=pltpu.VMEM((s.blocks, s.n, s.channels), jnp.float32),
        turned=pltpu.VMEM((s.channels, s.n), jnp.float32),
        columns=pltpu.VMEM((s.blocks, s.tokens, len(COLUMNS) * heads), jnp.float32),
        rows=pltpu.VMEM((s.blocks, len(ROWS), heads, s.tokens), jnp.float32),
        B=pltpu.VMEM((s.tokens, s.n), dtype),
        C=pltpu.VMEM((s.tokens, s.n), dtype),
        scores=pltpu.VMEM((chunks, size, size), jnp.float32),
    )


def _sums(s: Sizes) -> Sums:
    size, chunks, heads = s.tiling
    return Sums(
        starts=pltpu.VMEM((chunks, s.n, s.channels), jnp.float32),
        D=pltpu.VMEM((s.blocks, 1, s.channels), jnp.float32),
        B=pltpu.VMEM((s.tokens, s.n), jnp.float32),
        C=pltpu.VMEM((s.tokens, s.n), jnp.float32),
        scores=pltpu.VMEM((chunks, size, size), jnp.float32),
        heads=pltpu.VMEM((len(HeadSums._fields), s.blocks, heads, s.tokens), jnp.float32),
    )


def _dot(a: Array, b: Array, axes: Any = NN) -> Array:
    """A matrix product accumulated in float32; of float32 in full precision, not in one pass of bfloat16."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def _where(size: int, relation: Callable[[Array, Array], Array]) -> Array:
    """`relation(row, column)` at every place of a square matrix."""
    shape = (size, size)
    return relation(jax.lax.broadcasted_iota(jnp.int32, shape, 0), jax.lax.broadcasted_iota(jnp.int32, shape, 1))


def _chunk(s: Sizes, k: Any) -> Any:
    """The tokens of chunk k of a step."""
    size = s.tiling.chunk
    return pl.ds(pl.multiple_of(k * size, size), size)


def _prepare(s: Sizes, inputs: Inputs, scratch: Scratch) -> None:
    """Fills `scratch`, but for the state: decays at the first block of heads, scores at the first of each group."""
    j = pl.program_id(2)
    pl.when(j == 0)(partial(_prepare_decays, s, inputs, scratch))
    for group in range(s.g):
        pl.when(j == group * s.blocks_per_group)(partial(_prepare_scores, s, group, inputs, scratch))


def _prepare_decays(s: Sizes, inputs: Inputs, scratch: Scratch) -> None:
    heads = s.tiling.heads
    until = _where(s.tiling.chunk, jnp.less_equal).astype(jnp.float32)

    @pl.loop(0, s.tiling.chunks)
    def each_chunk(k: Any) -> None:
        tokens = _chunk(s, k)
        dt = inputs.dt[0, :, tokens]
        hi, lo = (_dot(part, until) for part in split(inputs.log_decay[0, :, tokens]))  # sums of hi are exact
        to_end = jnp.exp(hi[:, -1:] - hi) * jnp.exp(lo[:, -1:] - lo)
        columns = [array.T for array in (hi, lo, dt * to_end)]
        rows = [hi, dt, jnp.exp(-lo), jnp.exp(hi) * jnp.exp(lo), to_end]
        for j in range(s.blocks):
            block = slice(j * heads, (j + 1) * heads)
            for i, column in enumerate(columns):
                scratch.columns[j, tokens, i * heads : (i + 1) * heads] = column[:, block]
            for i, row in enumerate(rows):
                scratch.rows[j, i, :, tokens] = row[block]


def _prepare_scores(s: Sizes, group: int, inputs: Inputs, scratch: Scratch) -> None:
    """B and C of the group, and C_l . B_s for s <= l."""
    lanes = slice(group * s.n, (group + 1) * s.n)
    scratch.B[...] = inputs.B[0, :, lanes]
    scratch.C[...] = inputs.C[0, :, lanes]
    causal = _where(s.tiling.chunk, jnp.greater_equal)

    @pl.loop(0, s.tiling.chunks)
    def each_chunk(k: Any) -> None:
        tokens = _chunk(s, k)
        scratch.scores[k] = jnp.where(causal, _dot(scratch.C[tokens, :], scratch.B[tokens, :], NT), 0)


class Unit(NamedTuple):
    """The heads of one unit in one chunk: where they are in a block, and their `COLUMNS` and `ROWS`."""

    channels: slice
    heads: slice
    columns: dict[str, list[Array]]  # of each head [t, 1]
    rows: dict[str, Array]  # [head, t]

    def row(self, name: str, i: int) -> Array:
        """[1, t], of the i-th head."""
        return self.rows[name][i : i + 1]

    def weight(self, i: int) -> Array:
        """dt_s exp(-lo_s), [1, s], of the i-th head."""
        return self.row("dt", i) * self.row("exp_minus_lo", i)

    def decay(self, i: int) -> Array:
        """exp(hi_l - hi_s), [l, s], of the i-th head; 1 above the diagonal, where it could overflow."""
        return jnp.exp(jnp.minimum(self.columns["hi"][i] - self.row("hi", i), 0))


def _units(s: Sizes, scratch: Scratch, j: Any, k: Any) -> list[Unit]:
    """The units of block j in chunk k."""
    tokens, count = _chunk(s, k), s.tiling.heads
    columns, units = scratch.columns[j, tokens, :], []
    for start in range(0, count, s.unit_heads):
        heads = range(start, start + s.unit_heads)
        units.append(
            Unit(
                slice(start * s.p, heads.stop * s.p),
                slice(start, heads.stop),
                {
                    name: [columns[:, i * count + head : i * count + head + 1] for head in heads]
                    for i, name in enumerate(COLUMNS)
                },
                {name: scratch.rows[j, i, start : heads.stop, tokens] for i, name in enumerate(ROWS)},
            )
        )
    return units


def _head_of_lane(s: Sizes, rows: int) -> Array:
    """[rows, channels of a unit]: which of the unit's heads a channel belongs to."""
    return jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, (rows, s.unit), 1), s.p)


def _spread(s: Sizes, columns: list[Array]) -> Array:
    """[l, 1] of each head of a unit -> [l, channels of the unit]."""
    head = _head_of_lane(s, len(columns[0]))
    spread = jnp.broadcast_to(columns[0], head.shape)
    for i, column in enumerate(columns[1:], 1):
        spread = jnp.where(head == i, column, spread)
    return spread


def _stack(s: Sizes, array: Array) -> Array:
    """[l, channels of a unit] -> [(head, l), channels of a unit], with 0 outside of the head's own channels."""
    if s.unit_heads == 1:
        return array
    head = _head_of_lane(s, len(array))
    return jnp.concatenate([jnp.where(head == i, array, jnp.zeros_like(array)) for i in range(s.unit_heads)])


def _head_sums(s: Sizes, array: Array) -> Array:
    """[l, channels of a unit] -> [heads of a unit, l]: sums over the channels of each head."""
    rows = max(8, s.unit_heads)  # a tile has 8 sublanes
    own = _head_of_lane(s, rows) == jax.lax.broadcasted_iota(jnp.int32, (rows, s.unit), 0)
    return _dot(own.astype(jnp.float32), array, NT)[: s.unit_heads]


def _unfold(s: Sizes, ref: Any, scratch: Scratch) -> Array:
    """[n, channel], from a block of states as they lie in main memory."""
    for channels, lanes in _folds(s):
        scratch.turned[channels, :] = ref[0, :, lanes]
    return scratch.turned[...].T


def _fold(s: Sizes, state: Array, ref: Any, scratch: Scratch) -> None:
    """The inverse of `_unfold`, into `ref`."""
    scratch.turned[...] = state.T
    for channels, lanes in _folds(s):
        ref[0, :, lanes] = scratch.turned[channels, :]


def _folds(s: Sizes) -> list[tuple[Any, slice]]:
    """Which channels lie in which lanes of a folded state."""
    rows, _ = s.folded(s.channels)
    return [(pl.ds(i, rows, s.fold), slice(i * s.n, (i + 1) * s.n)) for i in range(s.fold)]


def _next_state(s: Sizes, unit: Unit, state: Array, heads_x: Array, B: Array) -> Array:
    """The state of a unit, [n, channels], at the end of a chunk, from x by `_stack`."""
    total = _spread(s, [unit.row("from_start", i)[:, -1:] for i in range(s.unit_heads)])
    B = B.astype(jnp.float32).T
    added = [B * (unit.row("dt", i) * unit.row("to_end", i)) for i in range(s.unit_heads)]
    return total * state + _dot(jnp.concatenate(added, axis=1).astype(heads_x.dtype), heads_x)


def _forward_kernel(
    s: Sizes,
    inputs: Inputs,
    first: tuple[Any, ...],
    y_ref: Any,
    last_ref: Any,
    saved: tuple[Any, ...],
    scratch: Scratch,
) -> None:
    c, j = pl.program_id(1), pl.program_id(2)
    _prepare(s, inputs, scratch)

    @pl.when(c == 0)
    def start_row() -> None:
        scratch.state[j] = _unfold(s, first[0], scratch) if first else jnp.zeros((s.n, s.channels), jnp.float32)

    for ref in saved:
        ref[0, 0] = scratch.state[j]

    @pl.loop(0, s.tiling.chunks)
    def each_chunk(k: Any) -> None:
        tokens = _chunk(s, k)
        B, C, scores = scratch.B[tokens, :], scratch.C[tokens, :], scratch.scores[k]
        for unit in _units(s, scratch, j, k):
            x, state = inputs.x[0, tokens, unit.channels], scratch.state[j, :, unit.channels]
            heads_x = _stack(s, x)
            M = [scores * unit.decay(i) * unit.weight(i) for i in range(s.unit_heads)]
            within = _dot(jnp.concatenate(M, axis=1).astype(x.dtype), heads_x)
            before = jnp.exp(_spread(s, unit.columns["hi"])) * _dot(C, state.astype(x.dtype))
            y = jnp.exp(_spread(s, unit.columns["lo"])) * (within + before) + inputs.D[:, unit.channels] * x
            y_ref[0, tokens, unit.channels] = y.astype(x.dtype)
            scratch.state[j, :, unit.channels] = _next_state(s, unit, state, heads_x, B)

    @pl.when(c == s.steps - 1)
    def end_row() -> None:
        _fold(s, scratch.state[j], last_ref, scratch)


def _backward_kernel(
    s: Sizes,
    inputs: Inputs,
    saved: tuple[Any],
    cotangents: tuple[Any, Any],
    gradients: Inputs,
    dfirst: tuple[Any, ...],
    scratch: Scratch,
    sums: Sums,
) -> None:
    c, j = pl.program_id(1), pl.program_id(2)
    dy_ref, dlast_ref = cotangents
    _prepare(s, inputs, scratch)
    _recompute_starts(s, j, inputs, saved[0], scratch, sums)

    @pl.when(c == 0)
    def start_row() -> None:
        scratch.state[j] = _unfold(s, dlast_ref, scratch)
        sums.D[j] = jnp.zeros((1, s.channels), jnp.float32)

    @pl.when(jax.lax.rem(j, s.blocks_per_group) == 0)
    def start_group() -> None:
        for ref in (sums.B, sums.C, sums.scores):
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    @pl.loop(0, s.tiling.chunks)
    def each_chunk(back: Any) -> None:
        k = s.tiling.chunks - 1 - back
        tokens = _chunk(s, k)
        for unit in _units(s, scratch, j, k):
            x, dy = (ref[0, tokens, unit.channels] for ref in (inputs.x, dy_ref))
            state, dstate = sums.starts[k, :, unit.channels], scratch.state[j, :, unit.channels]
            projections = scratch.B[tokens, :], scratch.C[tokens, :], scratch.scores[k]
            got = _unit_gradients(s, unit, x, dy, *projections, state, dstate, inputs.D[:, unit.channels])
            gradients.x[0, tokens, unit.channels] = got.x.astype(x.dtype)
            sums.B[tokens, :] += got.B
            sums.C[tokens, :] += got.C
            sums.scores[k] += got.scores
            sums.D[j, :, unit.channels] += got.D
            scratch.state[j, :, unit.channels] = got.state
            for i, row in enumerate(got.heads):
                sums.heads[i, j, unit.heads, tokens] = row

    for group in range(s.g):
        finish = partial(_finish_group, s, group, gradients, scratch, sums)
        pl.when(j == (group + 1) * s.blocks_per_group - 1)(finish)
    pl.when(j == s.blocks - 1)(partial(_finish_heads, s, gradients, sums))

    @pl.when(c == s.steps - 1)
    def end_row() -> None:
        gradients.D[0] = sums.D[j]
        for ref in dfirst:
            _fold(s, scratch.state[j], ref, scratch)


def _recompute_starts(s: Sizes, j: Any, inputs: Inputs, saved_ref: Any, scratch: Scratch, sums: Sums) -> None:
    """The states of block j at the starts of the chunks of a step, from the saved one."""
    sums.starts[0] = saved_ref[0, 0]

    @pl.loop(0, s.tiling.chunks - 1)
    def each_chunk(k: Any) -> None:
        tokens = _chunk(s, k)
        for unit in _units(s, scratch, j, k):
            state, heads_x = sums.starts[k, :, unit.channels], _stack(s, inputs.x[0, tokens, unit.channels])
            sums.starts[k + 1, :, unit.channels] = _next_state(s, unit, state, heads_x, scratch.B[tokens, :])


def _unit_gradients(
    s: Sizes,
    unit: Unit,
    x: Array,
    dy: Array,
    B: Array,
    C: Array,
    scores: Array,
    state: Array,
    dstate: Array,
    D: Array,
) -> UnitGradients:
    """Cotangents of one unit in one chunk, from `dy` and the cotangent `dstate` of the state at the chunk's end."""
    low_state, low_dstate = state.astype(x.dtype), dstate.astype(x.dtype)
    hi, lo, dt_to_end = (_spread(s, unit.columns[name]) for name in COLUMNS)
    exp_hi, exp_lo = jnp.exp(hi), jnp.exp(lo)
    dy_lo = exp_lo * dy
    dy_at_start, x_at_end = (exp_hi * dy_lo).astype(x.dtype), (dt_to_end * x).astype(x.dtype)

    # 1. Within the chunk.
    heads_dy = _stack(s, dy_lo.astype(x.dtype))
    M, dscores, ddt, within = _matrix_gradients(s, unit, scores, _dot(heads_dy, x, NT), x.dtype)

    # 2. Through the state at the start, which every token reads, and the one at the end, to which every token writes.
    read, written = _dot(C, low_state), _dot(B, low_dstate)
    total = exp_hi[-1:] * exp_lo[-1:]
    dtotal = jnp.sum(state * dstate, axis=0, keepdims=True)  # all log decays of the chunk add up to that of `total`
    last = jax.lax.broadcasted_iota(jnp.int32, dy.shape, 0) == len(dy) - 1
    reads = unit.rows["from_start"] * _head_sums(s, dy * read + jnp.where(last, dtotal, 0))
    writes = unit.rows["to_end"] * _head_sums(s, x * written)
    return UnitGradients(
        x=_dot(M, heads_dy, TN) + dt_to_end * written + D * dy,
        B=_dot(x_at_end, low_dstate, NT),
        C=_dot(dy_at_start, low_state, NT),
        scores=dscores,
        state=total * dstate + _dot(C, dy_at_start, TN),
        D=jnp.sum(dy.astype(jnp.float32) * x, axis=0, keepdims=True),
        heads=HeadSums(ddt + writes, within, reads, unit.rows["dt"] * writes),
    )


def _matrix_gradients(
    s: Sizes, unit: Unit, scores: Array, products: Array, dtype: DTypeLike
) -> tuple[Array, Array, Array, Array]:
    """Of M [l, s] in y_l = exp(lo_l) sum_s M x_s, for the heads of a unit, from `products` exp(lo_l) dy_l . x_s.

    Returns:
        M, one head above the other, and the cotangents of the scores [l, s], and of dt and the log decays, [head, t].
    """
    size, later = s.tiling.chunk, _where(s.tiling.chunk, jnp.greater_equal)
    M, W, ddt, dscores = [], [], [], jnp.zeros((size, size), jnp.float32)
    for i in range(s.unit_heads):
        decay, weight = unit.decay(i), unit.weight(i)
        dM = products[i * size : (i + 1) * size]
        weightless = scores * decay
        M.append((weightless * weight).astype(dtype))
        W.append((dM * weightless * weight).astype(dtype))
        ddt.append(unit.row("exp_minus_lo", i) * jnp.sum(dM * weightless, axis=0, keepdims=True))
        dscores += dM * decay * weight
    # The decay of token k stands in W of all s < k <= l. Sums of these only: differences of sums would cancel.
    before = _dot(jnp.concatenate(W), _where(size, jnp.less).astype(dtype))  # [(head, l), k]
    within = [
        jnp.sum(jnp.where(later, before[i * size : (i + 1) * size], 0), axis=0, keepdims=True)
        for i in range(s.unit_heads)
    ]
    return jnp.concatenate(M), dscores, jnp.concatenate(ddt), jnp.concatenate(within)


def _finish_group(s: Sizes, group: int, gradients: Inputs, scratch: Scratch, sums: Sums) -> None:
    """dB and dC of a group: what came through the states, and through the scores."""
    lanes = slice(group * s.n, (group + 1) * s.n)
    causal = _where(s.tiling.chunk, jnp.greater_equal)

    @pl.loop(0, s.tiling.chunks)
    def each_chunk(k: Any) -> None:
        tokens = _chunk(s, k)
        B, C = scratch.B[tokens, :], scratch.C[tokens, :]
        dscores = jnp.where(causal, sums.scores[k], 0).astype(B.dtype)
        gradients.B[0, tokens, lanes] = (sums.B[tokens, :] + _dot(dscores, C, TN)).astype(B.dtype)
        gradients.C[0, tokens, lanes] = (sums.C[tokens, :] + _dot(dscores, B)).astype(C.dtype)


def _finish_heads(s: Sizes, gradients: Inputs, sums: Sums) -> None:
    """The cotangents of dt and of the log decays of all heads."""
    size, _, heads = s.tiling
    from_here = _where(size, jnp.greater_equal).astype(jnp.float32)
    before = _where(size, jnp.less).astype(jnp.float32)

    @pl.loop(0, s.tiling.chunks)
    def each_chunk(k: Any) -> None:
        tokens = _chunk(s, k)
        for j in range(s.blocks):
            block = slice(j * heads, (j + 1) * heads)
            terms = HeadSums(*(sums.heads[i, j, :, tokens] for i in range(len(HeadSums._fields))))
            gradients.dt[0, block, tokens] = terms.dt
            through_states = _dot(terms.reads, from_here) + _dot(terms.writes, before)
            gradients.log_decay[0, block, tokens] = terms.within + through_states
