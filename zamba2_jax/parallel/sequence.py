"""Ops on rows whose time is divided over an axis of a mesh: what each device does, inside `jax.shard_map`.

The devices of the axis hold the parts of every row one after the other, all of one length. They send on what the next
part needs of the one before it: a few inputs of the convolution, states of the scan; and they gather the keys and
values of attention. Differentiable in reverse; for our scans and kernels `jax.shard_map` needs `check_vma=False`.
"""

from functools import partial

import jax
import jax.numpy as jnp

from zamba2_jax.choices import Implementation
from zamba2_jax.ops.attention import document_tags
from zamba2_jax.ops.attention_xla import attention_xla
from zamba2_jax.ops.conv import Activation, causal_conv1d
from zamba2_jax.ops.decay import log_decays
from zamba2_jax.ops.segments import document_index
from zamba2_jax.ops.selective_scan import SelectiveImplementation
from zamba2_jax.ops.selective_scan import selective_scan as ops_selective_scan
from zamba2_jax.ops.ssd import ssd
from zamba2_jax.ops.ssd_reference import join
from zamba2_jax.typing import Array, Bool, Float, Int, Shaped, at_least_fp32


def convolve(
    x: Float[Array, "b t e"],
    w: Float[Array, "k e"],
    bias: Float[Array, " e"],
    segment_ids: Int[Array, "b t"] | None,
    axis_name: str,
    activation: Activation | None = None,
) -> Float[Array, "b t e"]:
    """The outputs of `ops.causal_conv1d`, from the last k-1 inputs of the part before, and their documents.

    Raises:
        ValueError: a part is shorter than k-1.
    """
    past = w.shape[0] - 1
    if x.shape[1] < past:
        raise ValueError(f"{x.shape[1]} tokens on each device of mesh axis {axis_name!r}: expected at least {past}")
    ids = None if segment_ids is None else _after_last(segment_ids, past, axis_name)
    x = _after_last(x, past, axis_name)
    return causal_conv1d(x, w, bias, activation=activation, segment_ids=ids)[0][:, past:]


def _after_last(array: Shaped[Array, "b t *rest"], size: int, axis_name: str) -> Shaped[Array, "b s *rest"]:
    """This part of a row after the last `size` entries of the one before; zeros, or padding, before the first."""
    pairs = [(i, i + 1) for i in range(jax.lax.axis_size(axis_name) - 1)]
    return jnp.concatenate([jax.lax.ppermute(array[:, -size:], axis_name, pairs), array], axis=1)


def scan(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    A: Float[Array, " h"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    D: Float[Array, " h"] | None,
    segment_ids: Int[Array, "b t"] | None,
    axis_name: str,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """`ops.ssd`: y of this part, and the state after the whole row.

    Each device first reduces its part to what is left of a state after it, and the state it adds: one product, a small
    part of the scan. These pairs are gathered and joined, and the scan starts where the parts before end; so whatever
    implements it adds the state's share of y, and passes its gradient, in its own exact way.
    """
    decay, added = _reduced(x, dt, A, B, segment_ids)
    goes_on = jnp.ones((x.shape[0], 1), bool) if segment_ids is None else _goes_on(segment_ids, axis_name)[:, None]
    decay = jnp.where(goes_on, decay, 0)
    decays, states = (jax.lax.all_gather(part, axis_name) for part in (decay[..., None, None], added))
    _, ends = jax.lax.associative_scan(join, (decays, states))
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    start = jnp.where(goes_on[..., None, None], starts[jax.lax.axis_index(axis_name)], 0)
    y, _ = ssd(x, dt, A, B, C, D, initial_state=start, segment_ids=segment_ids, implementation=implementation)
    return y, ends[-1]


def selective_scan(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h p"],
    A: Float[Array, "h p n"],
    B: Float[Array, "b t h n"],
    C: Float[Array, "b t h n"],
    D: Float[Array, "h p"] | None,
    segment_ids: Int[Array, "b t"] | None,
    axis_name: str,
    implementation: SelectiveImplementation = "xla",
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """`ops.selective_scan`: y of this part, and the state after the whole row.

    As `scan`, but what a part adds to the state takes a scan of its own: there are no products of matrices to take its
    place.
    """
    wide = at_least_fp32(x.dtype)
    run = partial(ops_selective_scan, x, dt, A, B, C, segment_ids=segment_ids, implementation=implementation)
    _, added = run()
    real_dt = dt if segment_ids is None else jnp.where(segment_ids[..., None, None] != 0, dt, 0)
    total = jnp.minimum(real_dt.astype(wide).sum(axis=1), jnp.finfo(wide).max)
    decay, goes_on = jnp.exp(total[..., None] * A.astype(wide)), jnp.ones((x.shape[0], 1, 1, 1), bool)
    if segment_ids is not None:
        goes_on = _goes_on(segment_ids, axis_name)[:, None, None, None]
        restarts = (document_index(segment_ids)[:, -1] > 0)[:, None, None, None]
        decay = jnp.where(goes_on & ~restarts, decay, 0)
    decays, states = (jax.lax.all_gather(part, axis_name) for part in (decay, added))
    _, ends = jax.lax.associative_scan(join, (decays, states))
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    start = jnp.where(goes_on, starts[jax.lax.axis_index(axis_name)], 0)
    return run(D=D, initial_state=start)[0], ends[-1]


@jax.checkpoint
def _reduced(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    A: Float[Array, " h"],
    B: Float[Array, "b t g n"],
    segment_ids: Int[Array, "b t"] | None,
) -> tuple[Float[Array, "b h"], Float[Array, "b h p n"]]:
    """What a part leaves of the state before it, and the state after it from zeros, both at least float32.

    Sums of log decays are as long as the part: their rounding, relative to the decay, grows with the sum, by when
    nothing is left of the state.
    """
    (b, t, h, p), (g, n), wide = x.shape, B.shape[2:], at_least_fp32(x.dtype)
    if segment_ids is not None:
        dt = jnp.where(segment_ids[..., None] != 0, dt, 0)
    logs = log_decays(dt, A, segment_ids)
    to_end = jax.lax.cumsum(jnp.pad(logs[:, 1:], ((0, 0), (0, 1), (0, 0))), axis=1, reverse=True)
    values = (jnp.exp(to_end) * dt)[..., None] * x.astype(wide)
    added = jnp.einsum("btgrp,btgn->bgrpn", values.reshape(b, t, g, h // g, p), B.astype(wide))
    return jnp.exp(logs.sum(axis=1)), added.reshape(b, h, p, n)


def _goes_on(segment_ids: Int[Array, "b t"], axis_name: str) -> Bool[Array, " b"]:
    """Whether the first document of this part is the one that was last in the parts before, or all here is padding."""
    real = segment_ids != 0
    first, last = (
        jnp.take_along_axis(segment_ids, index[:, None], axis=1)[:, 0]
        for index in (real.argmax(axis=1), real.shape[1] - 1 - real[:, ::-1].argmax(axis=1))
    )
    lasts = jax.lax.all_gather(last, axis_name)
    part = jnp.arange(len(lasts))[:, None]
    latest = jnp.where((part < jax.lax.axis_index(axis_name)) & (lasts != 0), part, -1).max(axis=0)
    before = jnp.take_along_axis(lasts, jnp.maximum(latest, 0)[None], axis=0)[0]
    return (first == 0) | (first == before)


def attend(
    q: Float[Array, "b t h p"],
    k: Float[Array, "b t kv p"],
    v: Float[Array, "b t kv p"],
    scale: float,
    segment_ids: Int[Array, "b t"] | None,
    axis_name: str,
    window: int | None = None,
) -> Float[Array, "b t h p"]:
    """`ops.causal_attention` in plain XLA: this part's queries with the keys and values of all parts, gathered.

    Devices with later parts have more to do: the last one nearly twice the mean. With a window all have as much.
    """
    k, v = (jax.lax.all_gather(array, axis_name, axis=1, tiled=True) for array in (k, v))
    tags = None
    if segment_ids is not None:
        tags = document_tags(jax.lax.all_gather(segment_ids, axis_name, axis=1, tiled=True))
    return attention_xla(q, k, v, tags, scale, jax.lax.axis_index(axis_name) * q.shape[1], window)
