"""How evenly attention looks at what it may see."""

import jax
import jax.numpy as jnp

from zamba2_jax.ops.attention import document_tags
from zamba2_jax.typing import Array, Float, Int, at_least_fp32

QUERIES = 32
AT_A_TIME = 8
"""Queries of a row whose scores exist at once."""


def attention_entropy(
    q: Float[Array, "b t h p"],
    k: Float[Array, "b t kv p"],
    scale: float,
    segment_ids: Int[Array, "b t"] | None = None,
    *,
    queries: int = QUERIES,
) -> tuple[Float[Array, " h"], Float[Array, ""]]:
    """Entropy of each head's weights over that of uniform weights, summed over a few queries of every row.

    A query that sees n tokens has the entropy -sum(w ln w) / ln n: 1 where it looks at all of them alike, 0 where it
    looks at one. Its cost does not depend on how `causal_attention` is implemented: `queries` rows of scores.

    Args:
        q, k, scale, segment_ids: as for `causal_attention`.
        queries: how many of a row, at even distances, the last token among them.

    Returns:
        The sums, in at least float32, and how many queries each is over: those that see more than themselves.
    """
    (b, t, h, p), kv = q.shape, k.shape[2]
    wide, count = at_least_fp32(q.dtype), min(queries, t)
    tags = jnp.zeros((b, t), jnp.int32) if segment_ids is None else document_tags(segment_ids)
    real = jnp.ones((b, t), bool) if segment_ids is None else segment_ids != 0

    def of_query(at: Array) -> tuple[Array, Array]:
        heads = q[:, at].reshape(b, kv, h // kv, p)
        scores = jnp.einsum("bgrp,btgp->bgrt", heads, k, preferred_element_type=wide).reshape(b, h, t) * scale
        visible = (jnp.arange(t) <= at) & (tags == tags[:, at, None])
        log_w = jax.nn.log_softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
        entropy = -jnp.sum(jnp.exp(log_w) * log_w, axis=-1, where=visible[:, None])
        seen = visible.sum(axis=-1)
        counted = real[:, at] & (seen > 1)
        share = entropy / jnp.log(jnp.maximum(seen, 2)).astype(wide)[:, None]
        return jnp.sum(share, axis=0, where=counted[:, None]), counted.sum(dtype=wide)

    places = (jnp.arange(count) + 1) * t // count - 1
    shares, counted = jax.lax.map(of_query, places, batch_size=min(AT_A_TIME, count))
    return shares.sum(axis=0), counted.sum()
