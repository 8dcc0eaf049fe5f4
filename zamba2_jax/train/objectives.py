"""The training loss of a model."""

import jax
import jax.numpy as jnp
import numpy as np

from zamba2_jax.models.base import LanguageModel
from zamba2_jax.ops.backend import XLA, Backend, default_backend
from zamba2_jax.parallel.sharded_ops import cross_entropy, predictions
from zamba2_jax.typing import Array, Bool, DTypeLike, Float, Int, at_least_fp32


def next_token_loss(
    model: LanguageModel,
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"] | None = None,
    weights: Float[Array, "b t"] | None = None,
    *,
    chunk_size: int = 256,
    backend: Backend | None = None,
) -> tuple[Float[Array, ""], Int[Array, ""] | Float[Array, ""]]:
    """Mean cross entropy of every token given those before it in its document, in nats.

    Args:
        model: the model.
        tokens: rows of documents.
        segment_ids: which document each token belongs to, 0 for padding; one document per row by default.
        weights: of predicting each token, none negative; 0 is context that is not learnt from. 1 by default.
        chunk_size: positions whose logits exist at a time; see `ops.cross_entropy`.
        backend: how ops are computed; `default_backend` by default.

    Returns:
        The weighted mean, sum(weights * nll) / sum(weights), 0 where there is nothing to predict; and the sum of the
        weights of all tokens predicted, which is their number where no weights are given.

    Raises:
        ValueError: a token, -100 say, is outside the vocabulary. Under `jax.jit` tokens cannot be looked at.
    """
    check_ids(tokens, model.config.vocab_size)
    backend = default_backend(model.dtype) if backend is None else backend
    h = model.run(tokens, segment_ids, backend=backend).h
    count = target_weights(tokens, segment_ids, weights, at_least_fp32(h.dtype)).sum()
    share = loss_share(
        h, model.output_matrix, tokens, segment_ids, weights, count=count, chunk_size=chunk_size, backend=backend
    )
    return share[0], count


def loss_share(
    h: Float[Array, "b t d"],
    w: Float[Array, "v d"],
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"] | None,
    weights: Float[Array, "b t"] | None = None,
    *,
    count: Int[Array, ""] | Float[Array, ""],
    z_loss: float = 0.0,
    chunk_size: int = 256,
    backend: Backend = XLA,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What these rows add to a mean over predicted tokens, in at least float32.

    Args:
        h: the final norm's output.
        w: the output head.
        tokens, segment_ids, weights, chunk_size: as for `next_token_loss`.
        count: sum of the weights of the tokens predicted in all rows of the mean.
        z_loss: weight of the z-loss; see `ops.cross_entropy`.
        backend: how ops are computed.

    Returns:
        With the z-loss, and without it; no gradient flows through the latter.
    """
    targets, shares = _targets(h, tokens, segment_ids, weights, count)
    return cross_entropy(h, w, targets, shares, z_loss=z_loss, chunk_size=chunk_size, backend=backend)


def prediction_share(
    h: Float[Array, "b t d"],
    w: Float[Array, "v d"],
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"] | None,
    weights: Float[Array, "b t"] | None = None,
    *,
    count: Int[Array, ""] | Float[Array, ""],
    chunk_size: int = 256,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """As `loss_share` without gradient and z-loss, and how many targets of a weight above 0 are the likeliest token."""
    targets, shares = _targets(h, tokens, segment_ids, weights, count)
    return predictions(h, w, targets, shares, chunk_size=chunk_size)


def predicted(tokens: Int[Array, "b t"], segment_ids: Int[Array, "b t"] | None) -> Bool[Array, "b t"]:
    """True where the next token is of the same document, and so is predicted."""
    has_next = jnp.arange(tokens.shape[1]) < tokens.shape[1] - 1
    if segment_ids is not None:
        has_next &= (segment_ids == jnp.roll(segment_ids, -1, axis=1)) & (segment_ids != 0)
    return jnp.broadcast_to(has_next, tokens.shape)


def target_weights(
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"] | None,
    weights: Float[Array, "b t"] | None,
    dtype: DTypeLike = jnp.float32,
) -> Bool[Array, "b t"] | Float[Array, "b t"]:
    """At each token the weight of predicting the next one, in `dtype`; where weights are all 1, as `predicted`."""
    has_next = predicted(tokens, segment_ids)
    return has_next if weights is None else jnp.where(has_next, jnp.roll(weights, -1, axis=1), 0).astype(dtype)


def check_ids(tokens: Int[Array, "b t"], vocab_size: int) -> None:
    """Finds an id that is not in the vocabulary, where the ids are known.

    Raises:
        ValueError: there is one; the message names row, position and id.
    """
    if isinstance(tokens, jax.core.Tracer | jax.ShapeDtypeStruct) or not getattr(tokens, "is_fully_addressable", True):
        return
    ids = np.asarray(tokens)
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        row, position = np.argwhere((ids < 0) | (ids >= vocab_size))[0].tolist()
        raise ValueError(
            f"row {row}, position {position}: token id {ids[row, position]} is outside the vocabulary of {vocab_size} "
            "tokens; what is not to be learnt from has a weight of 0"
        )


def _targets(
    h: Array, tokens: Array, segment_ids: Array | None, weights: Array | None, count: Array
) -> tuple[Array, Array]:
    """At each token the next one, and its weight over the sum of all."""
    own = target_weights(tokens, segment_ids, weights, at_least_fp32(h.dtype))
    return jnp.roll(tokens, -1, axis=1), own / jnp.where(count > 0, count, 1)
