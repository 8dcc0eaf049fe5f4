"""Attention by blocks of queries, in plain XLA: its memory grows with the length, not with its square.

A block of queries meets all keys it may see at once, so that its softmax is exact and nothing is rescaled. The backward
pass computes the scores of a block again. The blocks of long rows share one loop (docs/xla-notes.md: blocks-at-once).
Those of short rows are a few, written out, each of which reads no key in vain.

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


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention_xla(
    q: Float[Array, "b t h p"],
    k: Float[Array, "b u kv p"],
    v: Float[Array, "b u kv p"],
    tags: Int[Array, "b u"] | None,
    scale: float,
    offset: Int[Array, ""] | None = None,
) -> Float[Array, "b t h p"]:
    """Softmax attention of every token to itself and those before it; with tags, only to those with its own.

    Differentiable once, in reverse. The softmax is in at least float32. The backward pass keeps the inputs and two
    numbers per query and head.

    Args:
        q, k, v: h is a multiple of kv; query head i reads key head i // (h / kv).
        tags: not to be crossed.
        scale: factor on the scores.
        offset: the first query belongs to this key, from 0 to u - t; to the first one by default.
    """
    return _forward(q, k, v, tags, scale, offset)[0]


def _forward(
    q: Array, k: Array, v: Array, tags: Array | None, scale: float, offset: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def attend(queries: _Queries, seen: int) -> tuple[Array, _Softmax]:
        scores = _scores(queries, keys[:, :, :seen], tags, scale)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = _product(weights.astype(v.dtype), values[:, :, :seen], (4, 2)) / total
        return out.astype(q.dtype), _Softmax(top, total)

    def forward(_: None, queries: _Queries, seen: int) -> tuple[None, tuple[Array, _Softmax]]:
        return None, attend(queries, seen)

    _, (out, softmax) = _over_blocks(forward, None, _queries(q, k, tags, offset), k.shape[1], offset)
    return _by_time(out), (q, k, v, tags, offset, softmax)


def _backward(scale: float, residuals: tuple[Any, ...], d_out: Array) -> tuple[Array | None, ...]:
    q, k, v, tags, offset, softmax = residuals
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    # Divided by the total here, where it is cheapest, so that the weights need not be; and before axes are swapped.
    d_heads = _by_heads((d_out / _by_time(softmax.total)).astype(q.dtype), k)
    zeros = jnp.zeros(keys.shape, at_least_fp32(k.dtype))

    def attend(sums: tuple[Array, Array], tokens: tuple[Any, ...], seen: int) -> tuple[tuple[Array, Array], Array]:
        queries, softmax, d_heads = tokens
        weights = jnp.exp(_scores(queries, keys[:, :, :seen], tags, scale) - softmax.top)
        d_weights = _product(d_heads, values[:, :, :seen], (4, 3))
        mean = sum_over(weights * d_weights, -1)[..., None] / softmax.total
        d_scores = weights * (d_weights - mean) * scale
        d_scores, weights = d_scores.astype(q.dtype), weights.astype(v.dtype)
        d_keys = _sum_of_products(d_scores, queries.heads)
        d_values = _sum_of_products(weights, d_heads)
        d_queries = _product(d_scores, keys[:, :, :seen], (4, 2)).astype(q.dtype)
        return (_add_in_front(sums[0], d_keys), _add_in_front(sums[1], d_values)), d_queries

    tokens = _queries(q, k, tags, offset), softmax, d_heads
    (d_keys, d_values), d_q = _over_blocks(attend, (zeros, zeros), tokens, k.shape[1], offset)
    return _by_time(d_q), d_keys.swapaxes(1, 2).astype(k.dtype), d_values.swapaxes(1, 2).astype(v.dtype), None, None


attention_xla.defvjp(_forward, _backward)


def _over_blocks(
    attend: Callable[[Any, Any, int], tuple[Any, Any]], carry: Any, tokens: Any, keys: int, offset: Array | None
) -> tuple[Any, Any]:
    """Calls attend(carry, part, number of keys to read) with one block of `tokens` after the other.

    No block reads all keys but the last ones. The number of keys has to be known when compiling: in the loop it is
    rounded up to one of `SPANS`.

    Returns:
        The last carry, and the results put together.
    """
    t = jax.tree.leaves(tokens)[0].shape[3]
    if offset is None and t <= WRITTEN_OUT * BLOCK:
        return _over_written_out_blocks(attend, carry, tokens)
    if t <= BLOCK:
        return attend(carry, tokens, keys)
    blocks, rest = divmod(t, BLOCK)
    first = 0 if offset is None else offset
    span = -(-(keys - rest) // (SPANS * BLOCK)) * BLOCK
    reach = [min(start + span, keys - rest) for start in range(0, keys - rest, span)]

    def step(carry: Any, block: tuple[Array, Any]) -> tuple[Any, Any]:
        index, part = block
        choices = [lambda carry, part, seen=seen: attend(carry, part, seen) for seen in reach]
        return jax.lax.switch((first + (index + 1) * BLOCK - 1) // span, choices, carry, part)

    stacked = jax.tree.map(lambda a: _stack(a[:, :, :, : blocks * BLOCK]), tokens)
    carry, results = jax.lax.scan(step, carry, (jnp.arange(blocks), stacked))
    results = jax.tree.map(_unstack, results)
    if rest:
        carry, last = attend(carry, jax.tree.map(lambda a: a[:, :, :, blocks * BLOCK :], tokens), keys)
        results = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=3), results, last)
    return carry, results


def _over_written_out_blocks(
    attend: Callable[[Any, Any, int], tuple[Any, Any]], carry: Any, tokens: Any
) -> tuple[Any, Any]:
    t, results = jax.tree.leaves(tokens)[0].shape[3], []
    block = max(SMALLEST, -(-t // WRITTEN_OUT))
    for start in range(0, t, block):
        end = min(start + block, t)
        carry, result = attend(carry, jax.tree.map(lambda a, of=slice(start, end): a[:, :, :, of], tokens), end)
        results.append(result)
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=3), *results)


def _stack(array: Shaped[Array, "b kv r t p"]) -> Shaped[Array, "n b kv r s p"]:
    return jnp.moveaxis(array.reshape(*array.shape[:3], -1, BLOCK, array.shape[-1]), 3, 0)


def _unstack(array: Float[Array, "n b kv r s p"]) -> Float[Array, "b kv r t p"]:
    array = jnp.moveaxis(array, 0, 3)
    return array.reshape(*array.shape[:3], -1, array.shape[-1])


def _scores(
    queries: _Queries, keys: Float[Array, "b kv u p"], key_tags: Int[Array, "b _"] | None, scale: float
) -> Float[Array, "b kv r t u"]:
    visible: Bool[Array, "#b 1 1 t u"] = jnp.arange(keys.shape[2]) <= queries.times
    if queries.tags is not None and key_tags is not None:
        visible &= queries.tags == key_tags[:, None, None, None, : keys.shape[2]]
    return jnp.where(visible, _product(queries.heads, keys, (4, 3)) * scale, HIDDEN)


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


def _add_in_front(sums: Float[Array, "b kv u p"], addend: Float[Array, "b kv s p"]) -> Float[Array, "b kv u p"]:
    seen = addend.shape[2]
    return jax.lax.dynamic_update_slice_in_dim(sums, sums[:, :, :seen] + addend, 0, axis=2)


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
