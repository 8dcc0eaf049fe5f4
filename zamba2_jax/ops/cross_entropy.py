"""Log-probabilities and the loss of a language model, without its logits in memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from zamba2_jax.ops.embedding import own_index
from zamba2_jax.ops.linear import matmul
from zamba2_jax.typing import Array, Float, Int, Tree, at_least_fp32


def token_log_probabilities(
    h: Float[Array, "b t d"],
    w: Float[Array, "d v"],
    targets: Int[Array, "b t"],
    *,
    chunk_size: int = 256,
    vocab_axis: str | None = None,
) -> Float[Array, "b t"]:
    """ln softmax(h w)[target], in at least float32.

    Logits exist for `chunk_size` positions of every row at a time, in the backward pass too, where they are computed
    again.

    Args:
        h: what the output head reads.
        w: the output head. Where it is wider than h it is rounded to h's dtype in each chunk, so that its gradient is
            summed over the chunks in its own.
        targets: a token at each position.
        chunk_size: positions per chunk.
        vocab_axis: inside `jax.shard_map`, the axis of the mesh that w is divided over, by columns.
    """
    return normalized_log_probabilities(h, w, targets, chunk_size=chunk_size, vocab_axis=vocab_axis)[0]


def normalized_log_probabilities(
    h: Float[Array, "b t d"],
    w: Float[Array, "d v"],
    targets: Int[Array, "b t"],
    *,
    chunk_size: int = 256,
    vocab_axis: str | None = None,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """`token_log_probabilities`, and what they were normalized by: ln sum exp(h w). From the same chunks."""
    wide = at_least_fp32(h.dtype)

    @jax.checkpoint
    def of_chunk(h: Array, targets: Array) -> tuple[Array, Array]:
        return _log_probability(matmul(h, w.astype(h.dtype), dtype=wide), targets, vocab_axis)

    return map_positions(of_chunk, h, targets, chunk_size)


def map_positions(f: Callable[..., Tree], h: Float[Array, "b t d"], targets: Int[Array, "b t"], size: int) -> Tree:
    """f(h, targets), a tree of arrays [b, t], computed for at most `size` positions of every row at a time."""
    (b, t), size = targets.shape, min(size, h.shape[1])

    def chunks(array: Array) -> Array:
        padded = jnp.pad(array, [(0, 0), (0, -t % size)] + [(0, 0)] * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(b, -1, size, *array.shape[2:]), 1, 0)

    by_chunk = jax.lax.map(lambda chunk: f(*chunk), (chunks(h), chunks(targets)))
    return jax.tree.map(lambda array: jnp.moveaxis(array, 0, 1).reshape(b, -1)[:, :t], by_chunk)


def _log_probability(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"], vocab_axis: str | None
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """The log-probability of the target and the logarithm of the normalizer."""
    if vocab_axis is None:
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - normalizer, normalizer
    top = jax.lax.pmax(jax.lax.stop_gradient(logits.max(axis=-1)), vocab_axis)
    total = jax.lax.psum(jnp.exp(logits - top[..., None]).sum(axis=-1), vocab_axis)
    index, here = own_index(targets, logits.shape[-1], vocab_axis)
    picked = jnp.where(here, jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0] - top, 0)
    return jax.lax.psum(picked, vocab_axis) - jnp.log(total), top + jnp.log(total)


def cross_entropy(
    h: Float[Array, "b t d"],
    w: Float[Array, "d v"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"],
    *,
    chunk_size: int = 256,
) -> Float[Array, ""]:
    """sum of weights * -ln softmax(h w)[target], in nats, in at least float32.

    Args:
        h, w, targets, chunk_size: as for `token_log_probabilities`, whose memory it takes.
        weights: of each position's loss; 0 leaves it out.
    """
    log_p = token_log_probabilities(h, w, targets, chunk_size=chunk_size)
    return -jnp.sum(weights.astype(log_p.dtype) * log_p)
