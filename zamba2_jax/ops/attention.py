"""Causal attention with grouped KV heads, over whole sequences and against a cache."""

import jax
import jax.numpy as jnp

from zamba2_jax.ops.segments import document_index
from zamba2_jax.typing import Array, Bool, Float, Int, at_least_fp32

BLOCK = 128
"""Slots of a cache that are attended to at a time: on CPU the fastest of 128, 256 and 512."""


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
    if q.dtype != jnp.float64:
        mask = None if same is None else same[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=True)
    # The softmax of `jax.nn.dot_product_attention` is in float32 whatever it is given: no oracle.
    (b, t, h, p), kv = q.shape, k.shape[2]
    visible = jnp.tril(jnp.ones((t, t), bool))
    visible = visible if same is None else visible & same[:, None, None]
    scores = jnp.einsum("btkrp,bukp->bkrtu", q.reshape(b, t, kv, h // kv, p), k) * scale
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkrtu,bukp->btkrp", weights, v).reshape(b, t, h, p)


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
    return _attend_in_blocks(q, cached_k, cached_v, slots, real, scale), cached_k, cached_v


def _attend_in_blocks(
    q: Float[Array, "b t h p"],
    k: Float[Array, "b u kv p"],
    v: Float[Array, "b u kv p"],
    slots: Int[Array, "b t"],
    real: Bool[Array, "b t"],
    scale: float,
) -> Float[Array, "b t h p"]:
    """Softmax attention of each query to the slots up to its own, block by block (arXiv:2112.05682).

    Only the blocks that hold tokens are read, so that time goes with the longest row and not with the capacity; and
    memory does not grow with either.
    """
    (b, t, h, p), (u, kv) = q.shape, k.shape[1:3]
    size, wide = min(BLOCK, u), at_least_fp32(q.dtype)
    q = q.reshape(b, t, kv, h // kv, p)

    def add(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = carry
        start = jnp.minimum(i * size, u - size)  # the last block may overlap the one before it
        at = start + jnp.arange(size)
        visible = (at >= i * size) & (at <= slots[:, :, None])
        block_k, block_v = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1).astype(q.dtype) for x in (k, v))
        scores = jnp.einsum("btkrp,bukp->bkrtu", q, block_k, preferred_element_type=wide) * scale
        scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        weights, kept = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
        added = jnp.einsum("bkrtu,bukp->bkrtp", weights.astype(q.dtype), block_v, preferred_element_type=wide)
        return new_top, kept * total + weights.sum(axis=-1), kept[..., None] * out + added

    zeros = jnp.zeros((b, kv, h // kv, t), wide)
    blocks = jnp.minimum(jnp.max(slots, where=real, initial=0), u - 1) // size + 1
    # Every query sees slot 0, so that `top` is finite from the first block on.
    _, total, out = jax.lax.fori_loop(0, blocks, add, (zeros - jnp.inf, zeros, jnp.zeros((*zeros.shape, p), wide)))
    return jnp.moveaxis(out / total[..., None], 3, 1).reshape(b, t, h, p).astype(q.dtype)
