"""The training loss of a model."""

import jax.numpy as jnp

from zamba2_jax.model.divided import cross_entropy
from zamba2_jax.model.zamba2 import Zamba2
from zamba2_jax.typing import Array, Bool, Float, Int


def next_token_loss(
    model: Zamba2,
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"] | None = None,
    *,
    chunk_size: int = 256,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Mean cross entropy of every token given those before it in its document, in nats.

    Args:
        model: the model.
        tokens: rows of documents.
        segment_ids: which document each token belongs to, 0 for padding; one document per row by default.
        chunk_size: positions whose logits exist at a time; see `ops.cross_entropy`.

    Returns:
        The mean, 0 where there is nothing to predict, and the number of tokens predicted.
    """
    h = model.hidden_states(tokens, segment_ids)[0]
    count = predicted(tokens, segment_ids).sum()
    return loss_share(h, model.output_matrix, tokens, segment_ids, count=count, chunk_size=chunk_size)[0], count


def loss_share(
    h: Float[Array, "b t d"],
    w: Float[Array, "v d"],
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"] | None,
    *,
    count: Int[Array, ""],
    z_loss: float = 0.0,
    chunk_size: int = 256,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What these rows add to a mean over `count` predicted tokens, in at least float32.

    Args:
        h: the final norm's output.
        w: the output head.
        tokens, segment_ids, chunk_size: as for `next_token_loss`.
        count: tokens predicted in all rows of the mean.
        z_loss: weight of the z-loss; see `ops.cross_entropy`.

    Returns:
        With the z-loss, and without it; no gradient flows through the latter.
    """
    weights = predicted(tokens, segment_ids) / jnp.maximum(count, 1)
    return cross_entropy(h, w, jnp.roll(tokens, -1, axis=1), weights, z_loss=z_loss, chunk_size=chunk_size)


def predicted(tokens: Int[Array, "b t"], segment_ids: Int[Array, "b t"] | None) -> Bool[Array, "b t"]:
    """True where the next token is of the same document, and so is predicted."""
    has_next = jnp.arange(tokens.shape[1]) < tokens.shape[1] - 1
    if segment_ids is not None:
        has_next &= (segment_ids == jnp.roll(segment_ids, -1, axis=1)) & (segment_ids != 0)
    return jnp.broadcast_to(has_next, tokens.shape)
