"""The loss of a language model, without its logits in memory."""

import jax
import jax.numpy as jnp

from zamba2_jax.ops.linear import matmul
from zamba2_jax.typing import Array, Float, Int, at_least_fp32


def cross_entropy(
    h: Float[Array, "b t d"],
    w: Float[Array, "d v"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"],
    *,
    chunk_size: int = 256,
) -> Float[Array, ""]:
    """sum of weights * (logsumexp(h w) - (h w)[target]), in nats, in at least float32.

    Logits exist for `chunk_size` positions of every row at a time, in the backward pass too, where they are computed
    again.

    Args:
        h: what the output head reads.
        w: the output head.
        targets: the token to predict at each position.
        weights: of each position's loss; 0 leaves it out.
        chunk_size: positions per chunk.
    """
    size = min(chunk_size, h.shape[1])
    wide = at_least_fp32(h.dtype)

    def chunks(array: Array) -> Array:
        padded = jnp.pad(array, [(0, 0), (0, -array.shape[1] % size)] + [(0, 0)] * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(array.shape[0], -1, size, *array.shape[2:]), 1, 0)

    @jax.checkpoint
    def add(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        h, targets, weights = chunk
        logits = matmul(h, w, dtype=wide)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return total + jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - picked)), None

    return jax.lax.scan(add, jnp.zeros((), wide), (chunks(h), chunks(targets), chunks(weights.astype(wide))))[0]
