"""The training loss of a model."""

from typing import NamedTuple

import jax.numpy as jnp

from zamba2_jax.model.divided import normalized_log_probabilities
from zamba2_jax.model.zamba2 import Zamba2
from zamba2_jax.typing import Array, Bool, Float, Int


class LossSums(NamedTuple):
    """Sums over the tokens predicted, in at least float32.

    Attributes:
        nll: of -ln p(token), in nats.
        z: of (ln sum exp(logits))^2, what the z-loss keeps small (arXiv:2204.02311, section 5).
    """

    nll: Float[Array, ""]
    z: Float[Array, ""]


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
    nll, _ = loss_sums(h, model.output_matrix, tokens, segment_ids, chunk_size=chunk_size)
    return nll / jnp.maximum(count, 1), count


def loss_sums(
    h: Float[Array, "b t d"],
    w: Float[Array, "d v"],
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"] | None = None,
    *,
    chunk_size: int = 256,
) -> LossSums:
    """What a loss is made of, from the final norm's output h and the output head w; for the rest see above."""
    log_p, normalizer = normalized_log_probabilities(h, w, jnp.roll(tokens, -1, axis=1), chunk_size=chunk_size)
    counts = predicted(tokens, segment_ids)
    return LossSums(nll=-jnp.sum(log_p, where=counts), z=jnp.sum(jnp.square(normalizer), where=counts))


def predicted(tokens: Int[Array, "b t"], segment_ids: Int[Array, "b t"] | None) -> Bool[Array, "b t"]:
    """True where the next token is of the same document, and so is predicted."""
    has_next = jnp.arange(tokens.shape[1]) < tokens.shape[1] - 1
    if segment_ids is not None:
        has_next &= (segment_ids == jnp.roll(segment_ids, -1, axis=1)) & (segment_ids != 0)
    return jnp.broadcast_to(has_next, tokens.shape)
