"""The ops that the compiler is not left to divide over a mesh: the same calls, run by each device on its part.

Without a mesh they are the ops. Rows of a full pass are divided over the axes of `batch` and `time`. Rows with a cache
are not divided in time, and over `batch` only if it divides their number: else every device has all of them.
"""

from collections.abc import Callable
from functools import partial
from math import gcd

import jax.numpy as jnp

from zamba2_jax import ops
from zamba2_jax.ops.attention import cache_fits_cudnn, fits_cudnn
from zamba2_jax.ops.backend import Backend
from zamba2_jax.ops.conv import Activation, last_inputs
from zamba2_jax.ops.selective_scan import SelectiveImplementation
from zamba2_jax.parallel import sequence
from zamba2_jax.parallel.mesh import ambient_mesh, constrain, parts, per_device, split_axis
from zamba2_jax.typing import Array, Bool, DTypeLike, Float, Int, Shaped, at_least_fp32


def row_axes(rows: int, *, cached: bool) -> tuple[str | None, str | None]:
    """The logical axes of [b, t]."""
    mesh = ambient_mesh()
    if not cached:
        return "batch", "time"
    return (None if mesh is None or rows % parts("batch", mesh) else "batch"), None


def embed(tokens: Int[Array, "b t"], table: Float[Array, "v d"], *, cached: bool) -> Float[Array, "b t d"]:
    """`ops.embed`, with the table divided by rows."""
    rows = row_axes(len(tokens), cached=cached)
    look_up = partial(ops.embed, vocab_axis=split_axis("vocab"))
    return per_device(look_up, [rows, ("vocab", None)], (*rows, None))(tokens, table)


def cross_entropy(
    h: Float[Array, "b t d"],
    w: Float[Array, "v d"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"],
    *,
    z_loss: float,
    chunk_size: int,
    backend: Backend,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`ops.cross_entropy`, the head divided by rows: no device has logits of the whole vocabulary."""
    rows = row_axes(len(targets), cached=False)
    op = partial(
        ops.cross_entropy,
        z_loss=z_loss,
        chunk_size=chunk_size,
        vocab_axis=split_axis("vocab"),
        custom_gradient=backend.custom_gradients,
    )
    return _summed(op, rows)(h, w, targets, weights)


def predictions(
    h: Float[Array, "b t d"],
    w: Float[Array, "v d"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"],
    *,
    chunk_size: int,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """`ops.predictions`, the head divided by rows."""
    rows = row_axes(len(targets), cached=False)
    op = partial(ops.predictions, chunk_size=chunk_size, vocab_axis=split_axis("vocab"))
    return _summed(op, rows)(h, w, targets, weights)


def _summed(
    op: Callable[..., tuple[Array, ...]], rows: tuple[str | None, str | None]
) -> Callable[..., tuple[Array, Array]]:
    """Two sums over rows, of which each device takes its rows' part."""

    def part(*arrays: Array) -> tuple[Array, ...]:
        return tuple(jnp.reshape(of_device, (1, 1)) for of_device in op(*arrays))

    run = per_device(part, [(*rows, None), ("vocab", None), rows, rows], [rows, rows])

    def whole(*arrays: Array) -> tuple[Array, Array]:
        first, second = run(*arrays)
        return first.sum(), second.sum()

    return whole


def causal_conv1d(
    x: Float[Array, "b t e"],
    w: Float[Array, "k e"],
    bias: Float[Array, " e"],
    channels: str | None,
    *,
    activation: Activation | None,
    initial_state: Float[Array, "b k-1 e"] | None,
    segment_ids: Int[Array, "b t"] | None,
    backend: Backend,
) -> tuple[Float[Array, "b t e"], Float[Array, "b k-1 e"]]:
    """`ops.causal_conv1d`; `channels` is the logical axis of e."""
    batch, time = row_axes(len(x), cached=initial_state is not None)
    axis = split_axis(time)
    tokens, taps, state = (batch, time, channels), (None, channels), (batch, None, channels)

    def part(x, w, bias, initial_state, segment_ids):
        return ops.causal_conv1d(
            x,
            w,
            bias,
            activation=activation,
            initial_state=initial_state,
            segment_ids=segment_ids,
            custom_gradient=backend.custom_gradients,
        )

    if axis is None:
        run = per_device(part, [tokens, taps, taps[1:], state, (batch, time)], [tokens, state])
        return run(x, w, bias, initial_state, segment_ids)
    convolve = partial(sequence.convolve, axis_name=axis, activation=activation)
    y = per_device(convolve, [tokens, taps, taps[1:], (batch, time)], tokens)(x, w, bias, segment_ids)
    return y, last_inputs(x, len(w), segment_ids=segment_ids)


def ssd(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    A: Float[Array, " h"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    D: Float[Array, " h"],
    *,
    initial_state: Float[Array, "b h p n"] | None,
    segment_ids: Int[Array, "b t"] | None,
    backend: Backend,
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """`ops.ssd`."""
    batch, time = row_axes(len(x), cached=initial_state is not None)
    axis = split_axis(time)

    def part(x, dt, A, B, C, D, initial_state, segment_ids):
        if axis is not None:
            return sequence.scan(x, dt, A, B, C, D, segment_ids, axis, backend.scan)
        return ops.ssd(
            x, dt, A, B, C, D, initial_state=initial_state, segment_ids=segment_ids, implementation=backend.scan
        )

    B, C = (_groups_of_devices(array, x.shape[2], (batch, time)) for array in (B, C))
    heads, state = (batch, time, "heads"), (batch, "heads", None, None)
    wide = (*heads, None)
    in_axes = [wide, heads, ("heads",), wide, wide, ("heads",), state, (batch, time)]
    return per_device(part, in_axes, [wide, state])(x, dt, A, B, C, D, initial_state, segment_ids)


def selective_scan(
    x: Float[Array, "b t e"],
    dt: Float[Array, "b t e"],
    A: Float[Array, "e n"],
    B: Float[Array, "b t h n"],
    C: Float[Array, "b t h n"],
    D: Float[Array, " e"],
    *,
    initial_state: Float[Array, "b e n"] | None,
    segment_ids: Int[Array, "b t"] | None,
    backend: Backend,
) -> tuple[Float[Array, "b t e"], Float[Array, "b e n"]]:
    """`ops.selective_scan`, e being the channels of all heads, which are divided even within a head."""
    batch, time = row_axes(len(x), cached=initial_state is not None)
    axis = split_axis(time)
    implementation: SelectiveImplementation = "sequential" if backend.scan in ("sequential", "associative") else "xla"

    def part(x, dt, A, B, C, D, initial_state, segment_ids):
        heads = partial(_by_heads, heads=B.shape[2])
        given = heads(x), heads(dt), heads(A, -2), B, C, heads(D)
        if axis is not None:
            y, state = sequence.selective_scan(*given, segment_ids, axis, implementation)
        else:
            start = None if initial_state is None else heads(initial_state, -2)
            y, state = ops.selective_scan(
                *given, initial_state=start, segment_ids=segment_ids, implementation=implementation
            )
        return y.reshape(x.shape), state.reshape(len(x), *A.shape)

    B, C = (jnp.repeat(array, _heads_apart(array.shape[2]), axis=2) for array in (B, C))
    wide, of_heads, state = (batch, time, "inner"), (batch, time, "inner", None), (batch, "inner", None)
    in_axes = [wide, wide, ("inner", None), of_heads, of_heads, ("inner",), state, (batch, time)]
    return per_device(part, in_axes, [wide, state])(x, dt, A, B, C, D, initial_state, segment_ids)


def selective_scan_step(
    x: Float[Array, "b e"],
    dt: Float[Array, "b e"],
    A: Float[Array, "e n"],
    B: Float[Array, "b h n"],
    C: Float[Array, "b h n"],
    D: Float[Array, " e"],
    *,
    state: Float[Array, "b e n"],
) -> tuple[Float[Array, "b e"], Float[Array, "b e n"]]:
    """`ops.selective_scan_step`, e as in `selective_scan`."""
    batch, _ = row_axes(len(x), cached=True)

    def part(x, dt, A, B, C, D, state):
        heads = partial(_by_heads, heads=B.shape[1])
        y, after = ops.selective_scan_step(heads(x), heads(dt), heads(A, -2), B, C, heads(D), state=heads(state, -2))
        return y.reshape(x.shape), after.reshape(state.shape)

    B, C = (jnp.repeat(array, _heads_apart(array.shape[1]), axis=1) for array in (B, C))
    wide, of_heads, of_state = (batch, "inner"), (batch, "inner", None), (batch, "inner", None)
    in_axes = [wide, wide, ("inner", None), of_heads, of_heads, ("inner",), of_state]
    return per_device(part, in_axes, [wide, of_state])(x, dt, A, B, C, D, state)


def project_heads(
    x: Float[Array, "b t e"], w: Float[Array, "o e"], heads: int, *, cached: bool, backend: Backend
) -> Float[Array, "b t h o"]:
    """The product of each head's channels of x with its columns of w; in the dtype of x, summed in at least float32."""
    rows, apart, wide = row_axes(len(x), cached=cached), _heads_apart(heads), at_least_fp32(x.dtype)
    on_device = heads * apart // _devices_of_inner()

    def part(x, w):
        size = x.shape[-1] // on_device
        columns = [slice(i * size, (i + 1) * size) for i in range(on_device)]
        return jnp.stack([backend.linear(x[..., own], w[:, own], dtype=wide) for own in columns], axis=-2)

    y = per_device(part, [(*rows, "inner"), (None, "inner")], (*rows, "inner", None))(x, w)
    return y.reshape(*y.shape[:2], heads, apart, -1).sum(axis=3).astype(x.dtype)


def project_to_heads(
    x: Float[Array, "b t h i"], w: Float[Array, "e i"], *, cached: bool, dtype: DTypeLike, backend: Backend
) -> Float[Array, "b t e"]:
    """The products of what each head has with its rows of w, one after the other, in `dtype`."""
    rows = row_axes(len(x), cached=cached)

    def part(x, w):
        size = len(w) // x.shape[2]
        own = (backend.linear(x[:, :, i], w[i * size : (i + 1) * size], dtype=dtype) for i in range(x.shape[2]))
        return jnp.concatenate(list(own), axis=-1)

    x = jnp.repeat(x, _heads_apart(x.shape[2]), axis=2)
    return per_device(part, [(*rows, "inner", None), ("inner", None)], (*rows, "inner"))(x, w)


def _heads_apart(heads: int) -> int:
    """Into how many parts of equal size a head is cut so that no device has parts of two but whole ones."""
    devices = _devices_of_inner()
    return devices // gcd(heads, devices)


def _devices_of_inner() -> int:
    mesh = ambient_mesh()
    return 1 if mesh is None else parts("inner", mesh)


def _by_heads(array: Array, axis: int = -1, *, heads: int) -> Array:
    """The array with the channels along an axis divided into heads."""
    axis %= array.ndim
    return array.reshape(*array.shape[:axis], heads, -1, *array.shape[axis + 1 :])


def _groups_of_devices(
    array: Float[Array, "b t g n"], heads: int, rows: tuple[str | None, str | None]
) -> Float[Array, "b t _ n"]:
    """B or C with groups repeated as often as heads of one group stand on different devices, so that groups divide too.

    A device has as few groups as its heads allow: a group of its own, or several whole ones, unless they do not align.
    """
    mesh = ambient_mesh()
    if mesh is None:
        return array
    array = constrain(array, *rows, None, None)
    per_group, on_device = heads // array.shape[2], heads // parts("heads", mesh)
    return jnp.repeat(array, per_group // gcd(per_group, on_device), axis=2)


def causal_attention(
    q: Float[Array, "b t h p"],
    k: Float[Array, "b t kv p"],
    v: Float[Array, "b t kv p"],
    scale: float,
    segment_ids: Int[Array, "b t"] | None,
    backend: Backend,
    window: int | None = None,
) -> Float[Array, "b t h p"]:
    """`ops.causal_attention`."""
    tokens = row_axes(len(q), cached=False)
    axis = split_axis("time")

    def part(q, k, v, segment_ids):
        if axis is not None:
            return sequence.attend(q, k, v, scale, segment_ids, axis, window)
        fits = backend.attention != "cudnn" or fits_cudnn(q, segment_ids, window)
        implementation = backend.attention if fits else "xla"
        return ops.causal_attention(q, k, v, scale, segment_ids, implementation, window=window)

    heads = (*tokens, "attention_heads", None)
    return per_device(part, [heads, heads, heads, tokens], heads)(q, k, v, segment_ids)


def cached_attention(
    q: Float[Array, "b t h p"],
    k: Float[Array, "b t kv p"],
    v: Float[Array, "b t kv p"],
    cached_k: Shaped[Array, "b kv u p"],
    cached_v: Shaped[Array, "b kv u p"],
    slots: Int[Array, "b t"],
    real: Bool[Array, "b t"],
    scale: float,
    backend: Backend,
) -> tuple[Float[Array, "b t h p"], Shaped[Array, "b kv u p"], Shaped[Array, "b kv u p"]]:
    """`ops.cached_attention`."""
    tokens = row_axes(len(q), cached=True)
    rows, time = tokens
    heads, cached = (rows, time, "attention_heads", None), (rows, "attention_heads", None, None)
    places = [heads] * 3 + [cached] * 2 + [tokens] * 2

    def part(q, k, v, cached_k, cached_v, slots, real):
        fits = backend.cached_attention != "cudnn" or cache_fits_cudnn(q, cached_k)
        implementation = backend.cached_attention if fits else "xla"
        return ops.cached_attention(q, k, v, cached_k, cached_v, slots, real, scale, implementation)

    return per_device(part, places, [heads, cached, cached])(q, k, v, cached_k, cached_v, slots, real)


def window_attention(
    q: Float[Array, "b t h p"],
    k: Float[Array, "b t kv p"],
    v: Float[Array, "b t kv p"],
    ring_k: Shaped[Array, "b kv w p"],
    ring_v: Shaped[Array, "b kv w p"],
    positions: Int[Array, "b t"],
    real: Bool[Array, "b t"],
    scale: float,
) -> tuple[Float[Array, "b t h p"], Shaped[Array, "b kv w p"], Shaped[Array, "b kv w p"]]:
    """`ops.window_attention`."""
    tokens = row_axes(len(q), cached=True)
    heads, ring = (*tokens, "attention_heads", None), (tokens[0], "attention_heads", None, None)
    run = per_device(
        partial(ops.window_attention, scale=scale), [heads] * 3 + [ring] * 2 + [tokens] * 2, [heads, ring, ring]
    )
    return run(q, k, v, ring_k, ring_v, positions, real)
