"""How evenly attention looks at what it may see."""

import jax
import jax.numpy as jnp

from zamba2_jax.ops.attention import document_tags
from zamba2_jax.typing import Array, Float, Int, at_least_fp32

QUERIES = 16
"""Of a row: their scores are in memory at once, for all heads."""


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
    count = min(queries, t)
    places = (jnp.arange(count) + 1) * t // count - 1
    heads = q[:, places].reshape(b, count, kv, h // kv, p)
    scores = jnp.einsum("bqgrp,btgp->bqgrt", heads, k, preferred_element_type=at_least_fp32(q.dtype)) * scale
    visible, counted = jnp.arange(t) <= places[:, None], jnp.ones((b, count), bool)
    if segment_ids is not None:
        tags = document_tags(segment_ids)
        visible, counted = visible & (tags[:, None] == tags[:, places, None]), segment_ids[:, places] != 0
    visible = jnp.broadcast_to(visible, (b, count, t))[:, :, None, None]
    log_w = jax.nn.log_softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    entropy = -jnp.sum(jnp.exp(log_w) * log_w, axis=-1, where=visible)
    seen = visible.sum(axis=-1)
    share = (entropy / jnp.log(jnp.maximum(seen, 2)).astype(entropy.dtype)).reshape(b, count, h)
    counted &= seen[:, :, 0, 0] > 1
    return jnp.sum(share, axis=(0, 1), where=counted[..., None]), counted.sum(dtype=share.dtype)
