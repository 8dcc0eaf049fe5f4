"""Causal attention with grouped KV heads, over whole sequences and against a cache."""

from typing import Literal

import jax
import jax.numpy as jnp

from zamba2_jax.ops.attention_splash import attention_splash
from zamba2_jax.ops.attention_xla import attention_xla
from zamba2_jax.ops.placement import kernels, platform
from zamba2_jax.ops.segments import document_index
from zamba2_jax.typing import Array, Bool, DTypeLike, Float, Int, Shaped, at_least_fp32

BLOCK = 512
"""Slots of a cache that many queries attend to at a time: on CPU the fastest of powers of two."""
FITTING = 2**19
"""Numbers in those keys of a block that one query per row attends to: what stays in a CPU's cache while it is read."""
FILLING = 2**24
"""The same on a GPU. docs/xla-notes.md: loops-on-gpu"""

LARGEST_MASK = 2**28
"""Pairs of tokens of a row up to which cuDNN is the default where it reads a mask of them, half a GB of so many."""

Implementation = Literal["xla", "splash", "cudnn", "plain"]
CachedImplementation = Literal["xla", "cudnn"]


def causal_attention(
    q: Float[Array, "b t h p"],
    k: Float[Array, "b t kv p"],
    v: Float[Array, "b t kv p"],
    scale: float,
    segment_ids: Int[Array, "b t"] | None = None,
    implementation: Implementation | None = None,
    *,
    window: int | None = None,
) -> Float[Array, "b t h p"]:
    """Softmax attention of every token to itself and the tokens before it in its document.

    Differentiable once, in reverse; "plain" as often as wanted, in any mode. But for "plain" no implementation holds
    scores of all tokens with all tokens; "cudnn" with `segment_ids` holds a mask of them, which all heads share.

    Args:
        q, k, v: h is a multiple of kv; query head i reads key head i // (h / kv).
        scale: factor on the scores.
        segment_ids: documents; nothing attends across them, nothing but padding to padding. See `ops.segments`.
        implementation: "xla", by blocks of queries, for any dtype; "splash", JAX's kernel for TPUs, for bfloat16 and
            float32; "cudnn", on NVIDIA GPUs, for float16 and bfloat16 and head dims that are multiples of 8 up to 256
            (128 before Hopper), without a window; "plain", the definition, without a gradient of our own. By default
            what `default_implementation` gives.
        window: tokens that a token sees at most: itself and window - 1 before it (arXiv:2310.06825, section 2); all by
            default. "xla" and "splash" compute no block of scores in which there is nothing to see.

    Raises:
        ValueError: `implementation` is not valid, or does not do what is asked of it; or the window is below 1.
        NotImplementedError: the GPU is too old for the head dim with "cudnn".
    """
    if window is not None and window < 1:
        raise ValueError(f"window={window}: expected at least 1, the token itself")
    implementation = implementation or default_implementation(q, segment_ids, window)
    tags = None if segment_ids is None else document_tags(segment_ids)
    if implementation == "cudnn":
        if window is not None:
            raise ValueError(f"window={window} with implementation='cudnn': expected one of xla, splash, plain")
        mask = None if tags is None else tags[:, :, None] == tags[:, None, :]
        return _cudnn(q, k, v, mask, scale, is_causal=True)
    if implementation == "splash":
        return attention_splash(q, k, v, tags, scale, window)
    if implementation == "xla":
        return attention_xla(q, k, v, tags, scale, window=window)
    if implementation == "plain":
        return _plain(q, k, v, tags, scale, window)
    raise ValueError(f"implementation={implementation!r}: expected one of xla, splash, cudnn, plain")


def _plain(q: Array, k: Array, v: Array, tags: Array | None, scale: float, window: int | None) -> Array:
    (b, t, h, p), kv, wide = q.shape, k.shape[2], at_least_fp32(q.dtype)
    q = q.reshape(b, t, kv, h // kv, p)
    scores = scale * jnp.einsum("bqkrp,bukp->bkrqu", q, k, preferred_element_type=wide)
    visible = jnp.tril(jnp.ones((t, t), bool))
    if window is not None:
        visible &= ~jnp.tril(visible, -window)
    if tags is not None:
        visible = (visible & (tags[:, :, None] == tags[:, None, :]))[:, None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bkrqu,bukp->bqkrp", weights, v, preferred_element_type=wide).reshape(b, t, h, p).astype(v.dtype)


def document_tags(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """A number for each token: two may attend to each other where it is the same. Padding has its own."""
    return 2 * document_index(segment_ids) + (segment_ids != 0)


def cached_attention(
    q: Float[Array, "b t h p"],
    k: Float[Array, "b t kv p"],
    v: Float[Array, "b t kv p"],
    cached_k: Shaped[Array, "b kv u p"],
    cached_v: Shaped[Array, "b kv u p"],
    slots: Int[Array, "b t"],
    real: Bool[Array, "b t"],
    scale: float,
    implementation: CachedImplementation | None = None,
) -> tuple[Float[Array, "b t h p"], Shaped[Array, "b kv u p"], Shaped[Array, "b kv u p"]]:
    """Writes new keys and values into a cache, then attends to all of the row up to each query.

    Not differentiable in reverse.

    Args:
        q, k, v: of the new tokens.
        cached_k, cached_v: slots [0, slots[:, 0]) hold the tokens before; the others' content is not read. Heads stand
            before slots, so that what a head reads is one piece of memory. Of a floating-point dtype, or of uint16 for
            the bits of bfloat16; see `stored_dtype`.
        slots: where each new token goes, ascending along t. A slot past the end is not written.
        real: False at padding, which is not written either and whose output has no meaning.
        scale: factor on the scores.
        implementation: "xla", by blocks of slots, as far as there are tokens; or "cudnn", which reads all slots and a
            mask [b, t, u], for what `causal_attention` has it for. By default "cudnn" on a Hopper GPU for what it
            takes, for more than one new token and a mask of up to `LARGEST_MASK`; else "xla".

    Returns:
        The attention output, and the cache's keys and values with the new tokens in them.

    Raises:
        ValueError: `implementation` is not valid, or does not take q.
    """
    row = jnp.arange(q.shape[0])[:, None]
    target = jnp.where(real, slots, cached_k.shape[2])
    cached_k = cached_k.at[row, :, target].set(_stored(k, cached_k.dtype), mode="drop")
    cached_v = cached_v.at[row, :, target].set(_stored(v, cached_v.dtype), mode="drop")
    if implementation is None:
        implementation = "cudnn" if kernels() == "gpu" and cache_fits_cudnn(q, cached_k) else "xla"
    if implementation == "cudnn":
        visible = jnp.arange(cached_k.shape[2]) <= slots[..., None]
        keys, values = (_read(x, q.dtype).swapaxes(1, 2) for x in (cached_k, cached_v))
        return _cudnn(q, keys, values, visible, scale, is_causal=False), cached_k, cached_v
    if implementation == "xla":
        return _attend_in_blocks(q, cached_k, cached_v, slots, real, scale), cached_k, cached_v
    raise ValueError(f"implementation={implementation!r}: expected one of xla, cudnn")


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
    """Attention of new tokens to themselves and to the w - 1 tokens before each, of which a ring holds the last w.

    In XLA, on any device. Not differentiable in reverse.

    Args:
        q, k, v: of the new tokens.
        ring_k, ring_v: slot i % w holds token i of the row, for its last w tokens; of a dtype as in `cached_attention`.
        positions: of the new tokens in their rows, one after the other along t.
        real: False at padding, at the end of a row, which is not written and whose output has no meaning.
        scale: factor on the scores.

    Returns:
        The attention output, and the ring's keys and values after the new tokens.
    """
    (b, t), w = positions.shape, ring_k.shape[2]
    row, length = jnp.arange(b)[:, None], positions[:, :1] + real.sum(axis=1, keepdims=True)
    target = jnp.where(real & (positions >= length - w), positions % w, w)
    after_k = ring_k.at[row, :, target].set(_stored(k, ring_k.dtype), mode="drop")
    after_v = ring_v.at[row, :, target].set(_stored(v, ring_v.dtype), mode="drop")
    if t == 1:  # what is in the ring now is what the token sees, as far as the ring has been filled
        out = _attend_in_blocks(q, after_k, after_v, jnp.minimum(positions, w - 1), real, scale)
        return out, after_k, after_v
    before = positions[:, :1] - (w - 1) + jnp.arange(w - 1)  # in the order of time
    keys, values = (
        jnp.concatenate([_read(ring[row, :, before % w], q.dtype), new], axis=1)
        for ring, new in ((ring_k, k), (ring_v, v))
    )
    there = jnp.concatenate([before >= 0, jnp.ones((b, t), bool)], axis=1).astype(jnp.int32)
    return attention_xla(q, keys, values, there, scale, jnp.int32(w - 1), w), after_k, after_v


def stored_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of a cache that is to hold keys and values of `dtype` on the platform of what is traced now.

    On CPU bfloat16 is held as its bits (docs/xla-notes.md: bits-of-bfloat16).
    """
    bits = jnp.dtype(dtype) == jnp.bfloat16 and platform() == "cpu"
    return jnp.dtype(jnp.uint16 if bits else dtype)


def _stored(array: Float[Array, "*_"], dtype: jnp.dtype) -> Shaped[Array, "*_"]:
    """As a cache of `dtype` holds it."""
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(array.astype(jnp.bfloat16), dtype)
    return array.astype(dtype)


def _read(stored: Shaped[Array, "*_"], dtype: DTypeLike) -> Float[Array, "*_"]:
    """What a cache holds, in `dtype`."""
    if stored.dtype == jnp.uint16:
        stored = jax.lax.bitcast_convert_type(stored, jnp.bfloat16)
    return stored.astype(dtype)


def _attend_in_blocks(
    q: Float[Array, "b t h p"],
    k: Shaped[Array, "b kv u p"],
    v: Shaped[Array, "b kv u p"],
    slots: Int[Array, "b t"],
    real: Bool[Array, "b t"],
    scale: float,
) -> Float[Array, "b t h p"]:
    """Softmax attention of each query to the slots up to its own, block by block (arXiv:2112.05682).

    Only the blocks that hold tokens are read, so that time goes with the longest row and not with the capacity; and
    memory does not grow with either.
    """
    (b, t, h, p), (kv, u) = q.shape, k.shape[1:3]
    size, wide = _block_size(k, t), at_least_fp32(q.dtype)
    # docs/xla-notes.md: queries-in-one-axis
    q = q.swapaxes(1, 2).reshape(b, kv, h // kv * t, p)
    last = jnp.tile(slots, (1, h // kv))[:, None, :, None]
    matrices = (0, 1), (0, 1)

    def add(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = carry
        start = jnp.minimum(i * size, u - size)  # the last block may overlap the one before it
        at = start + jnp.arange(size)
        visible = (at >= i * size) & (at <= last)
        block_k, block_v = (_read(jax.lax.dynamic_slice_in_dim(x, start, size, axis=2), q.dtype) for x in (k, v))
        scores = jax.lax.dot_general(q, block_k, (((3,), (3,)), matrices), preferred_element_type=wide) * scale
        scores = jnp.where(visible, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
        weights, kept = jnp.exp(scores - new_top), jnp.exp(top - new_top)
        added = jax.lax.dot_general(
            weights.astype(q.dtype), block_v, (((3,), (2,)), matrices), preferred_element_type=wide
        )
        return new_top, kept * total + weights.sum(axis=-1, keepdims=True), kept * out + added

    zeros = jnp.zeros((*q.shape[:3], 1), wide)
    # Every query sees slot 0, so that `top` is finite from the first block on.
    nothing = zeros - jnp.inf, zeros, jnp.zeros(q.shape, wide)
    if size == u:
        _, total, out = add(jnp.int32(0), nothing)
    else:
        blocks = jnp.minimum(jnp.max(slots, where=real, initial=0), u - 1) // size + 1
        _, total, out = jax.lax.fori_loop(0, blocks, add, nothing)
    return (out / total).reshape(b, h, t, p).swapaxes(1, 2).astype(q.dtype)


def most_blocks(tokens: int, capacity: int) -> int:
    """In how many blocks several new tokens meet a cache that holds `tokens` after them, not on a GPU."""
    return -(-tokens // _block_of_many(capacity))


def _block_of_many(capacity: int) -> int:
    # docs/xla-notes.md: half-the-cache
    return min(BLOCK, -(-capacity // 2))


def _block_size(k: Shaped[Array, "b kv u p"], queries: int) -> int:
    """Slots that are attended to at a time."""
    b, kv, u, p = k.shape
    if platform() == "gpu":
        return min(u, max(BLOCK, FILLING // (b * kv * p)) if queries == 1 else BLOCK)
    fitting = next(size for size in (512, 256, 128, 64, 32) if size == 32 or size * b * kv * p <= FITTING)
    return min(fitting, _block_of_many(u)) if queries == 1 else _block_of_many(u)


def _cudnn(q: Array, k: Array, v: Array, mask: Array | None, scale: float, *, is_causal: bool) -> Array:
    """By cuDNN, for a mask of [b, t, u], True where a query may attend."""
    if reason := _not_for_cudnn(q):
        raise ValueError(reason)
    mask = None if mask is None else mask[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=is_causal, implementation="cudnn")


def default_implementation(
    q: Float[Array, "b t h p"], segment_ids: Int[Array, "b t"] | None, window: int | None = None
) -> Implementation:
    """What `causal_attention` uses unless told; with several devices see `placement`.

    "splash" on a TPU; "cudnn" on a Hopper GPU for what it takes, in documents for rows of an even length, as it has no
    gradient of others, and up to a mask of `LARGEST_MASK`; else "xla". On other GPUs cuDNN has not been measured to be
    faster yet.
    """
    if (found := kernels()) == "tpu":
        return "splash"
    return "cudnn" if found == "gpu" and fits_cudnn(q, segment_ids, window) else "xla"


def fits_cudnn(q: Float[Array, "b t h p"], segment_ids: Int[Array, "b t"] | None, window: int | None = None) -> bool:
    """Whether cuDNN takes a full pass, with its gradient, and its mask of documents is at most `LARGEST_MASK`.

    With a window it does not.
    """
    t = q.shape[1]
    unfit = segment_ids is not None and (t % 2 != 0 or t * t > LARGEST_MASK)
    return window is None and not unfit and _not_for_cudnn(q) is None


def cache_fits_cudnn(q: Float[Array, "b t h p"], cached_k: Shaped[Array, "b kv u p"]) -> bool:
    """Whether cuDNN takes queries of several tokens against a cache, with a mask of at most `LARGEST_MASK`."""
    t, u = q.shape[1], cached_k.shape[2]
    return t > 1 and t * u <= LARGEST_MASK and _not_for_cudnn(q) is None


def _not_for_cudnn(q: Array) -> str | None:
    """Why cuDNN does not take q, if so."""
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"q has dtype {q.dtype}, cuDNN takes float16 and bfloat16"
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        return f"the head dim is {q.shape[-1]}, cuDNN takes multiples of 8 up to 256"
    return None
