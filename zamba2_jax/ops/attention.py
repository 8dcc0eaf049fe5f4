"""Causal attention with grouped KV heads, over whole sequences and against a cache."""

import jax
import jax.numpy as jnp

from zamba2_jax.ops.segments import document_index
from zamba2_jax.typing import Array, Bool, Float, Int


def causal_attention(
    q: Float[Array, "b t h p"],
    k: Float[Array, "b t kv p"],
    v: Float[Array, "b t kv p"],
    scale: float,
    segment_ids: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t h p"]:
    """Softmax attention of every token to itself and the tokens before it in its document.

    Args:
        q, k, v: h is a multiple of kv; query head i reads key head i // (h / kv).
        scale: factor on the scores.
        segment_ids: documents; nothing attends across them, nothing but padding to padding. See `ops.segments`.
    """
    if segment_ids is None:
        return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True)
    document, real = document_index(segment_ids), segment_ids != 0
    same = (document[:, :, None] == document[:, None, :]) & (real[:, :, None] == real[:, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=same[:, None], scale=scale, is_causal=True)


def cached_attention(
    q: Float[Array, "b t h p"],
    k: Float[Array, "b t kv p"],
    v: Float[Array, "b t kv p"],
    cached_k: Float[Array, "b u kv p"],
    cached_v: Float[Array, "b u kv p"],
    slots: Int[Array, "b t"],
    real: Bool[Array, "b t"],
    scale: float,
) -> tuple[Float[Array, "b t h p"], Float[Array, "b u kv p"], Float[Array, "b u kv p"]]:
    """Writes new keys and values into a cache, then attends to all of the row up to each query.

    Args:
        q, k, v: of the new tokens.
        cached_k, cached_v: slots [0, slots[:, 0]) hold the tokens before; the others' content is not read.
        slots: where each new token goes, ascending along t. A slot past the end is not written.
        real: False at padding, which is not written either and whose output has no meaning.
        scale: factor on the scores.

    Returns:
        The attention output, and the cache's keys and values with the new tokens in them.
    """
    row = jnp.arange(q.shape[0])[:, None]
    target = jnp.where(real, slots, cached_k.shape[1])
    cached_k = cached_k.at[row, target].set(k.astype(cached_k.dtype), mode="drop")
    cached_v = cached_v.at[row, target].set(v.astype(cached_v.dtype), mode="drop")
    visible = jnp.arange(cached_k.shape[1]) <= slots[:, :, None]
    out = jax.nn.dot_product_attention(
        q, cached_k.astype(q.dtype), cached_v.astype(q.dtype), mask=visible[:, None], scale=scale
    )
    return out, cached_k, cached_v
