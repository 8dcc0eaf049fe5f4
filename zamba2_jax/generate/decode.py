"""Prefill, one decode step, and the plain loop of the two."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from zamba2_jax.model.cache import Cache, init_cache
from zamba2_jax.model.zamba2 import Zamba2
from zamba2_jax.typing import Array, Float, Int


def prefill(
    model: Zamba2,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, " b"] | None = None,
    cache: Cache | None = None,
    *,
    capacity: int | None = None,
) -> tuple[Float[Array, "b v"], Cache]:
    """Takes prompts in, or goes on with them.

    Args:
        model: the model.
        tokens: prompts, padded at the end.
        lengths: real tokens in each row, from 1 to t; t by default.
        cache: where the rows stand; empty by default. Pass a prompt in pieces by passing the cache along.
        capacity: tokens each row can hold, only for a new cache; `config.max_position_embeddings`, or t if that is
            more, by default.

    Returns:
        Logits after the last real token of each row, and the cache with the tokens. In a row that has outgrown its
        cache the logits are NaN.

    Raises:
        ValueError: there are no tokens, lengths are out of range, t is more than the cache holds, the cache is for
            another number of rows, or both cache and capacity are given.
    """
    b, t = tokens.shape
    if t == 0:
        raise ValueError(f"tokens has shape {tokens.shape}: expected at least one token")
    if cache is None:
        capacity = max(model.config.max_position_embeddings, t) if capacity is None else capacity
        cache = init_cache(model.config, b, capacity, model.dtype)
    elif capacity is not None:
        raise ValueError(f"capacity={capacity} is for a new cache, and one of capacity {cache.capacity} is given")
    if len(cache.lengths) != b:
        raise ValueError(f"tokens has {b} rows, expected {len(cache.lengths)}, as the cache")
    if t > cache.capacity:
        raise ValueError(f"{t} tokens in a row: expected at most the capacity of the cache, {cache.capacity}")
    if lengths is not None:
        _check_lengths(lengths, b, t)
    return _prefill(model, tokens, lengths, cache)


@jax.jit
def _prefill(model: Zamba2, tokens: Array, lengths: Array | None, cache: Cache) -> tuple[Array, Cache]:
    b, t = tokens.shape
    lengths = jnp.full(b, t) if lengths is None else jnp.asarray(lengths)
    padding = (jnp.arange(t) < lengths[:, None]).astype(jnp.int32)
    h, after = model.hidden_states(tokens, padding, cache=cache)
    assert after is not None
    last = jnp.take_along_axis(h, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return _nan_where_full(model.logits(last), after), after


@jax.jit
def decode_step(model: Zamba2, token: Int[Array, " b"], cache: Cache) -> tuple[Float[Array, "b v"], Cache]:
    """Logits after one more token in every row, and the cache with it.

    In a row that has outgrown its cache the logits are NaN.
    """
    logits, cache = model.step(token, cache)
    return _nan_where_full(logits, cache), cache


def generate(
    model: Zamba2,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continues every prompt by `max_new_tokens` tokens.

    Args:
        model: the model.
        prompts: token ids.
        max_new_tokens: how many to add.
        temperature: 0 takes the likeliest token; above, samples from softmax(logits / temperature).
        seed: of the sampling.

    Raises:
        ValueError: a prompt is empty or holds an id outside the vocabulary, `max_new_tokens` is below 1, or the
            temperature is negative.
    """
    vocab = model.config.vocab_size
    if not prompts:
        raise ValueError("prompts is empty, expected at least one")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty, expected at least one token")
        outside = [token for token in prompt if not 0 <= token < vocab]
        if outside:
            raise ValueError(f"prompt {i} holds token {outside[0]}, expected ids in [0, {vocab})")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: expected at least 1")
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature}: expected 0 or more")
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    logits, cache = prefill(
        model, jnp.asarray(tokens), jnp.asarray(lengths), capacity=int(lengths.max()) + max_new_tokens
    )
    new = _decode_loop(model, logits, cache, jax.random.key(seed), max_new_tokens, temperature)
    return np.asarray(new).tolist()


@partial(jax.jit, static_argnames=("steps", "temperature"))
def _decode_loop(model: Zamba2, logits: Array, cache: Cache, key: Array, steps: int, temperature: float) -> Array:
    def pick(logits: Array, key: Array) -> Array:
        if temperature == 0:
            return jnp.argmax(logits, axis=-1)
        return jax.random.categorical(key, logits.astype(jnp.float32) / temperature)

    def step(carry: tuple[Array, Cache], key: Array) -> tuple[tuple[Array, Cache], Array]:
        token, cache = carry
        logits, cache = model.step(token, cache)
        token = pick(logits, key)
        return (token, cache), token

    keys = jax.random.split(key, steps)
    first = pick(logits, keys[0])
    _, rest = jax.lax.scan(step, (first, cache), keys[1:])
    return jnp.concatenate([first[:, None], rest.T], axis=1)


def _check_lengths(lengths: Array, b: int, t: int) -> None:
    if np.shape(lengths) != (b,):
        raise ValueError(f"lengths has shape {np.shape(lengths)}, expected {(b,)}")
    traced = isinstance(lengths, jax.core.Tracer)
    if not traced and (np.min(lengths) < 1 or np.max(lengths) > t):
        raise ValueError(f"lengths={np.asarray(lengths)}: expected values in [1, {t}]")


def _nan_where_full(logits: Array, cache: Cache) -> Array:
    """A row past the end of its cache has lost tokens: better no answer than a wrong one."""
    return jnp.where((cache.lengths > cache.capacity)[:, None], jnp.nan, logits)
