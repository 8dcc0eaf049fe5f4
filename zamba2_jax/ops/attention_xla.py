"""Attention by blocks of queries, in plain XLA: its memory grows with the length, not with its square.

A block of queries meets all keys it may see at once, so that its softmax is exact and nothing is rescaled. The backward
pass computes the scores of a block again. The blocks of long rows share one loop (docs/xla-notes.md: blocks-at-once).
Those of short rows are a few, written out, each of which reads no key in vain. With a window no block reads a key that
none of its queries sees, but for those at the ends of a row.

Letters as in `typing`, r for the query heads of a key head, n for blocks, s for the queries of a block, u for keys.
What belongs to queries has five axes here, [b, kv, r, t, ...], where b, kv and r may be 1.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zamba2_jax.ops.sums import sum_over
from zamba2_jax.typing import Array, Bool, Float, Int, Shaped, at_least_fp32

BLOCK = 256
SPANS = 8
WRITTEN_OUT = 4
"""Blocks of a short row, which is one of so many times `BLOCK` queries at most."""
SMALLEST = 64
"""Queries of a block of a short row at least."""
HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: where nothing is visible all weights are the same, not NaN


class _Queries(NamedTuple):
    """Queries, where they stand, and the tags of the keys they see."""

    heads: Float[Array, "b kv r t p"]
    times: Int[Array, "1 1 1 t 1"]
    tags: Int[Array, "b 1 1 t 1"] | None


class _Softmax(NamedTuple):
    """What the backward pass needs of it: the largest score, and the sum of exp(scores - top)."""

    top: Float[Array, "b kv r t 1"]
    total: Float[Array, "b kv r t 1"]


class _Seen(NamedTuple):
    """Keys that a block of queries meets, one after the other.

    Attributes:
        start: the first of them.
        size: how many.
    """

    start: int | Int[Array, ""]
    size: int

    def of(self, array: Array, axis: int = 2) -> Array:
        """Of keys [b, kv, u, p], or of what belongs to keys, along that axis."""
        if isinstance(self.start, int):
            return jax.lax.slice_in_dim(array, self.start, self.start + self.size, axis=axis)
        return jax.lax.dynamic_slice_in_dim(array, self.start, self.size, axis=axis)


@partial(jax.custom_vjp, nondiff_argnums=(4, 6))
def attention_xla(
    q: Float[Array, "b t h p"],
    k: Float[Array, "b u kv p"],
    v: Float[Array, "b u kv p"],
    tags: Int[Array, "b u"] | None,
    scale: float,
    offset: Int[Array, ""] | None = None,
    window: int | None = None,
) -> Float[Array, "b t h p"]:
    """Softmax attention of every token to itself and those before it; with tags, only to those with its own.

    Differentiable once, in reverse. The softmax is in at least float32. The backward pass keeps the inputs and two
    numbers per query and head.

    Args:
        q, k, v: h is a multiple of kv; query head i reads key head i // (h / kv).
        tags: not to be crossed.
        scale: factor on the scores.
        offset: the first query belongs to this key, from 0 to u - t; to the first one by default.
        window: keys that a query sees at most, its own and those just before it; all by default.
    """
    return _forward(q, k, v, tags, scale, offset, window)[0]


def _forward(
    q: Array, k: Array, v: Array, tags: Array | None, scale: float, offset: Array | None, window: int | None
) -> tuple[Array, tuple[Any, ...]]:
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def attend(queries: _Queries, seen: _Seen) -> tuple[Array, _Softmax]:
        scores = _scores(queries, seen, keys, tags, scale, window)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = _product(weights.astype(v.dtype), seen.of(values), (4, 2)) / total
        return out.astype(q.dtype), _Softmax(top, total)

    def forward(_: None, queries: _Queries, seen: _Seen) -> tuple[None, tuple[Array, _Softmax]]:
        return None, attend(queries, seen)

    _, (out, softmax) = _over_blocks(forward, None, _queries(q, k, tags, offset), k.shape[1], offset, window)
    return _by_time(out), (q, k, v, tags, offset, softmax)


def _backward(scale: float, window: int | None, residuals: tuple[Any, ...], d_out: Array) -> tuple[Array | None, ...]:
    q, k, v, tags, offset, softmax = residuals
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    # Divided by the total here, where it is cheapest, so that the weights need not be; and before axes are swapped.
    d_heads = _by_heads((d_out / _by_time(softmax.total)).astype(q.dtype), k)
    zeros = jnp.zeros(keys.shape, at_least_fp32(k.dtype))

    def attend(sums: tuple[Array, Array], tokens: tuple[Any, ...], seen: _Seen) -> tuple[tuple[Array, Array], Array]:
        queries, softmax, d_heads = tokens
        weights = jnp.exp(_scores(queries, seen, keys, tags, scale, window) - softmax.top)
        d_weights = _product(d_heads, seen.of(values), (4, 3))
        mean = sum_over(weights * d_weights, -1)[..., None] / softmax.total
        d_scores = weights * (d_weights - mean) * scale
        d_scores, weights = d_scores.astype(q.dtype), weights.astype(v.dtype)
        d_keys = _sum_of_products(d_scores, queries.heads)
        d_values = _sum_of_products(weights, d_heads)
        d_queries = _product(d_scores, seen.of(keys), (4, 2)).astype(q.dtype)
        return (_add(sums[0], d_keys, seen), _add(sums[1], d_values, seen)), d_queries

    tokens = _queries(q, k, tags, offset), softmax, d_heads
    (d_keys, d_values), d_q = _over_blocks(attend, (zeros, zeros), tokens, k.shape[1], offset, window)
    return _by_time(d_q), d_keys.swapaxes(1, 2).astype(k.dtype), d_values.swapaxes(1, 2).astype(v.dtype), None, None


attention_xla.defvjp(_forward, _backward)


def _over_blocks(
    attend: Callable[[Any, Any, _Seen], tuple[Any, Any]],
    carry: Any,
    tokens: Any,
    keys: int,
    offset: Array | None,
    window: int | None,
) -> tuple[Any, Any]:
    """Calls attend(carry, part, the keys to read) with one block of `tokens` after the other.

    No block reads all keys but the last ones. The number of keys has to be known when compiling: in the loop it is
    rounded up to one of `SPANS`, or with a window it is what all blocks but the first ones need.

    Returns:
        The last carry, and the results put together.
    """
    t = jax.tree.leaves(tokens)[0].shape[3]
    if offset is None and t <= WRITTEN_OUT * BLOCK:
        return _over_written_out_blocks(attend, carry, tokens, window)
    first = 0 if offset is None else offset
    if t <= BLOCK:
        return attend(carry, tokens, _in_reach(first, t, keys, window))
    blocks, rest = divmod(t, BLOCK)

    def in_window(carry: Any, index: Array, part: Any) -> tuple[Any, Any]:
        return attend(carry, part, _in_reach(first + index * BLOCK, BLOCK, keys, window))

    span = -(-(keys - rest) // (SPANS * BLOCK)) * BLOCK
    reach = [min(start + span, keys - rest) for start in range(0, keys - rest, span)]

    def in_span(carry: Any, index: Array, part: Any) -> tuple[Any, Any]:
        choices = [lambda carry, part, size=size: attend(carry, part, _Seen(0, size)) for size in reach]
        return jax.lax.switch((first + (index + 1) * BLOCK - 1) // span, choices, carry, part)

    run = in_span if window is None or window - 1 + BLOCK >= keys else in_window
    stacked = jax.tree.map(lambda a: _stack(a[:, :, :, : blocks * BLOCK]), tokens)
    carry, results = jax.lax.scan(lambda carry, block: run(carry, *block), carry, (jnp.arange(blocks), stacked))
    results = jax.tree.map(_unstack, results)
    if rest:
        seen = _in_reach(first + blocks * BLOCK, rest, keys, window)
        carry, last = attend(carry, jax.tree.map(lambda a: a[:, :, :, blocks * BLOCK :], tokens), seen)
        results = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=3), results, last)
    return carry, results


def _over_written_out_blocks(
    attend: Callable[[Any, Any, _Seen], tuple[Any, Any]], carry: Any, tokens: Any, window: int | None
) -> tuple[Any, Any]:
    t, results = jax.tree.leaves(tokens)[0].shape[3], []
    block = max(SMALLEST, -(-t // WRITTEN_OUT))
    for start in range(0, t, block):
        end = min(start + block, t)
        begin = 0 if window is None else max(0, start - window + 1)
        part = jax.tree.map(lambda a, of=slice(start, end): a[:, :, :, of], tokens)
        carry, result = attend(carry, part, _Seen(begin, end - begin))
        results.append(result)
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=3), *results)


def _in_reach(first: int | Array, queries: int, keys: int, window: int | None) -> _Seen:
    """The keys that some queries in a row see, as many for every first query; all without a window."""
    if window is None or window - 1 + queries >= keys:
        return _Seen(0, keys)
    size = window - 1 + queries
    return _Seen(jnp.clip(first - window + 1, 0, keys - size), size)


def _stack(array: Shaped[Array, "b kv r t p"]) -> Shaped[Array, "n b kv r s p"]:
    return jnp.moveaxis(array.reshape(*array.shape[:3], -1, BLOCK, array.shape[-1]), 3, 0)


def _unstack(array: Float[Array, "n b kv r s p"]) -> Float[Array, "b kv r t p"]:
    array = jnp.moveaxis(array, 0, 3)
    return array.reshape(*array.shape[:3], -1, array.shape[-1])


def _scores(
    queries: _Queries,
    seen: _Seen,
    keys: Float[Array, "b kv u p"],
    key_tags: Int[Array, "b _"] | None,
    scale: float,
    window: int | None,
) -> Float[Array, "b kv r t s"]:
    """Of queries with the keys they meet, `HIDDEN` where they do not see them."""
    times = seen.start + jnp.arange(seen.size)
    visible: Bool[Array, "#b 1 1 t s"] = times <= queries.times
    if window is not None:
        visible &= times > queries.times - window
    if queries.tags is not None and key_tags is not None:
        visible &= queries.tags == seen.of(key_tags, axis=1)[:, None, None, None, :]
    return jnp.where(visible, _product(queries.heads, seen.of(keys), (4, 3)) * scale, HIDDEN)


def _product(
    a: Float[Array, "b kv r t _"], b: Float[Array, "b kv u p"], axes: tuple[int, int]
) -> Float[Array, "b kv r t _"]:
    """Over one axis of each, accumulated in at least float32."""
    dimensions = (axes[:1], axes[1:]), ((0, 1), (0, 1))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=at_least_fp32(a.dtype))


def _sum_of_products(a: Float[Array, "b kv r t u"], b: Float[Array, "b kv r t p"]) -> Float[Array, "b kv u p"]:
    """Over the queries of all heads that read a key head, accumulated in at least float32."""
    a, b = (array.reshape(*array.shape[:2], -1, array.shape[-1]) for array in (a, b))
    dimensions = ((2,), (2,)), ((0, 1), (0, 1))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=at_least_fp32(a.dtype))


def _add(sums: Float[Array, "b kv u p"], addend: Float[Array, "b kv s p"], seen: _Seen) -> Float[Array, "b kv u p"]:
    return jax.lax.dynamic_update_slice_in_dim(sums, seen.of(sums) + addend, seen.start, axis=2)


def _queries(
    q: Float[Array, "b t h p"], k: Float[Array, "b u kv p"], tags: Int[Array, "b u"] | None, offset: Array | None
) -> _Queries:
    times, own = jnp.arange(q.shape[1]), None if tags is None else tags[:, : q.shape[1]]
    if offset is not None:
        times += offset
        own = None if tags is None else jax.lax.dynamic_slice_in_dim(tags, offset, q.shape[1], axis=1)
    return _Queries(
        _by_heads(q, k), times[None, None, None, :, None], None if own is None else own[:, None, None, :, None]
    )


def _by_heads(q: Float[Array, "b t h p"], k: Float[Array, "b u kv p"]) -> Float[Array, "b kv r t p"]:
    b, t, h, p = q.shape
    return q.swapaxes(1, 2).reshape(b, k.shape[2], h // k.shape[2], t, p)


def _by_time(heads: Float[Array, "b kv r t p"]) -> Float[Array, "b t h p"]:
    b, kv, r, t, p = heads.shape
    return heads.reshape(b, kv * r, t, p).swapaxes(1, 2)
