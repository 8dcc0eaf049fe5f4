"""The loss of a language model, without its logits in memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from zamba2_jax.ops.embedding import own_index
from zamba2_jax.ops.linear import linear
from zamba2_jax.typing import Array, Float, Int, Tree, at_least_fp32


def cross_entropy(
    h: Float[Array, "b t d"],
    w: Float[Array, "v d"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"],
    *,
    z_loss: float = 0.0,
    chunk_size: int = 256,
    vocab_axis: str | None = None,
    custom_gradient: bool = True,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums over tokens of weights * (nll + z_loss * z^2), and of weights * nll, in at least float32.

    nll = -ln softmax(h w.T)[target], in nats, and z = ln sum exp(h w.T), whose square the z-loss keeps small
    (arXiv:2204.02311, section 5). No gradient flows through the second sum. The first is differentiable once, in
    reverse; without `custom_gradient` as often as wanted, in any mode.

    Logits exist for `chunk_size` positions of every row at a time. Where there is to be a gradient, each chunk computes
    its own at once, so that no logits are kept and none are computed again; not so without `custom_gradient`.

    Args:
        h: what the output head reads.
        w: the output head. Where it is wider than h it is rounded to h's dtype in each chunk, so that its gradient is
            summed over the chunks in its own.
        targets: a token at each position.
        weights: of each position's loss; 0 leaves it out.
        z_loss: weight of the z-loss.
        chunk_size: positions per chunk.
        vocab_axis: inside `jax.shard_map`, the axis of the mesh that w is divided over, by rows.
    """
    weights, sums = weights.astype(at_least_fp32(h.dtype)), _sums if custom_gradient else _plain_sums
    objective, nll = sums(h, w, targets, weights, z_loss, chunk_size, vocab_axis)
    return objective, jax.lax.stop_gradient(nll)


def predictions(
    h: Float[Array, "b t d"],
    w: Float[Array, "v d"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"],
    *,
    chunk_size: int = 256,
    vocab_axis: str | None = None,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The sum of weights * nll, as `cross_entropy` has it, and the number of hits: no gradient flows through them.

    A hit is a target of a weight above 0 that is the likeliest token, of equals the first. Arguments as there.
    """
    weights = weights.astype(at_least_fp32(h.dtype))

    def of_chunk(chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        h, targets, weights = chunk
        logits = linear(h, w.astype(h.dtype), dtype=weights.dtype)
        log_p, _ = _log_probability(logits, targets, vocab_axis)
        hits = (weights > 0) & (_likeliest(logits, vocab_axis) == targets)
        return -jnp.sum(weights * log_p), hits.sum(dtype=jnp.int32)

    nlls, hits = jax.lax.map(of_chunk, _chunks((h, targets, weights), chunk_size))
    return jax.lax.stop_gradient(nlls.sum()), hits.sum()


def _plain_sums(
    h: Array, w: Array, targets: Array, weights: Array, z_loss: float, chunk_size: int, vocab_axis: str | None
) -> tuple[Array, Array]:
    def of_chunk(chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        h, targets, weights = chunk
        objective, (nll, _) = _of_chunk(h, w, targets, weights, z_loss, vocab_axis, custom_gradient=False)
        return objective, nll

    objectives, nlls = jax.lax.map(of_chunk, _chunks((h, targets, weights), chunk_size))
    return objectives.sum(), nlls.sum()


_sums = jax.custom_vjp(_plain_sums, nondiff_argnums=(4, 5, 6))


def _forward(
    h: Array, w: Array, targets: Array, weights: Array, z_loss: float, chunk_size: int, vocab_axis: str | None
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    differentiated = jax.value_and_grad(_of_chunk, argnums=(0, 1), has_aux=True)

    def of_chunk(d_w: Array, chunk: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        h, targets, weights = chunk
        (objective, (nll, terms)), (d_h, more) = differentiated(h, w, targets, weights, z_loss, vocab_axis)
        return d_w + more, (objective, nll, d_h, terms)

    chunks = _chunks((h, targets, weights), chunk_size)
    d_w, (objectives, nlls, d_h, terms) = jax.lax.scan(of_chunk, jnp.zeros_like(w), chunks)
    return (objectives.sum(), nlls.sum()), (_by_time(d_h, h.shape[1]), d_w, _by_time(terms, h.shape[1]))


def _backward(
    z_loss: float,
    chunk_size: int,
    vocab_axis: str | None,
    gradients: tuple[Array, ...],
    cotangents: tuple[Array, Array],
) -> tuple[Array | None, ...]:
    d_h, d_w, d_weights = ((cotangents[0] * gradient).astype(gradient.dtype) for gradient in gradients)
    return d_h, d_w, None, d_weights


_sums.defvjp(_forward, _backward)


def _of_chunk(
    h: Array,
    w: Array,
    targets: Array,
    weights: Array,
    z_loss: float,
    vocab_axis: str | None,
    custom_gradient: bool = True,
) -> tuple[Array, tuple[Array, Array]]:
    """The objective; and the sum of nll, and what each token's weight is multiplied by."""
    logits = linear(h, w.astype(h.dtype), dtype=weights.dtype, custom_gradient=custom_gradient)
    log_p, normalizer = _log_probability(logits, targets, vocab_axis)
    terms = z_loss * jnp.square(normalizer) - log_p
    return jnp.sum(weights * terms), (-jnp.sum(weights * log_p), terms)


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


def _likeliest(logits: Float[Array, "b t v"], vocab_axis: str | None) -> Int[Array, "b t"]:
    """The token of the largest logit, the first of equals."""
    likeliest = jnp.argmax(logits, axis=-1)
    if vocab_axis is None:
        return likeliest
    largest = logits.max(axis=-1)
    whole = logits.shape[-1] * jax.lax.axis_size(vocab_axis)
    index = likeliest + logits.shape[-1] * jax.lax.axis_index(vocab_axis)
    return jax.lax.pmin(jnp.where(largest == jax.lax.pmax(largest, vocab_axis), index, whole), vocab_axis)


def map_positions(f: Callable[..., Tree], h: Float[Array, "b t d"], targets: Int[Array, "b t"], size: int) -> Tree:
    """f(h, targets), a tree of arrays [b, t], computed for at most `size` positions of every row at a time."""
    by_chunk = jax.lax.map(lambda chunk: f(*chunk), _chunks((h, targets), size))
    return jax.tree.map(lambda array: _by_time(array, targets.shape[1]), by_chunk)


def _chunks(arrays: tuple[Array, ...], size: int) -> tuple[Array, ...]:
    """Each array [b, t, ...] cut in time, [chunks, b, size, ...], filled up with zeros."""

    def cut(array: Array) -> Array:
        b, t, *rest = array.shape
        length = min(size, t)
        padded = jnp.pad(array, [(0, 0), (0, -t % length)] + [(0, 0)] * len(rest))
        return jnp.moveaxis(padded.reshape(b, -1, length, *rest), 1, 0)

    return tuple(map(cut, arrays))


def _by_time(chunks: Array, length: int) -> Array:
    """What `_chunks` cut, put together, [b, t, ...]."""
    _, b, _, *rest = chunks.shape
    return jnp.moveaxis(chunks, 0, 1).reshape(b, -1, *rest)[:, :length]
