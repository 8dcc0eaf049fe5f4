"""The training loss of a model."""

import jax.numpy as jnp

from zamba2_jax.model.divided import token_log_probabilities
from zamba2_jax.model.zamba2 import Zamba2
from zamba2_jax.typing import Array, Float, Int


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
    predicted = jnp.arange(tokens.shape[1]) < tokens.shape[1] - 1
    if segment_ids is not None:
        predicted &= (segment_ids == jnp.roll(segment_ids, -1, axis=1)) & (segment_ids != 0)
    predicted = jnp.broadcast_to(predicted, tokens.shape)
    count = predicted.sum()
    targets = jnp.roll(tokens, -1, axis=1)
    log_p = token_log_probabilities(h, model.output_matrix, targets, chunk_size=chunk_size, cached=False)
    return -jnp.sum(log_p, where=predicted) / jnp.maximum(count, 1), count
