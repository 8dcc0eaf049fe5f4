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
    same = None
    if segment_ids is not None:
        document, real = document_index(segment_ids), segment_ids != 0
        same = (document[:, :, None] == document[:, None, :]) & (real[:, :, None] == real[:, None, :])
    return _attend(q, k, v, same, scale, is_causal=True)


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
    out = _attend(q, cached_k.astype(q.dtype), cached_v.astype(q.dtype), visible, scale)
    return out, cached_k, cached_v


def _attend(
    q: Float[Array, "b t h p"],
    k: Float[Array, "b u kv p"],
    v: Float[Array, "b u kv p"],
    visible: Bool[Array, "b t u"] | None,
    scale: float,
    *,
    is_causal: bool = False,
) -> Float[Array, "b t h p"]:
    """Softmax attention of every query to the keys it may see, at least one."""
    if q.dtype != jnp.float64:
        mask = None if visible is None else visible[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=is_causal)
    # The softmax of `jax.nn.dot_product_attention` is in float32 whatever it is given: no oracle.
    (b, t, h, p), kv = q.shape, k.shape[2]
    mask = jnp.tril(jnp.ones((t, k.shape[1]), bool)) if is_causal else jnp.ones((t, k.shape[1]), bool)
    mask = mask if visible is None else mask & visible[:, None, None]
    scores = jnp.einsum("btkrp,bukp->bkrtu", q.reshape(b, t, kv, h // kv, p), k) * scale
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkrtu,bukp->btkrp", weights, v).reshape(b, t, h, p)
