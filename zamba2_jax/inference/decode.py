"""Prefill and one decode step."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from zamba2_jax.models.base import LanguageModel
from zamba2_jax.models.cache import init_cache
from zamba2_jax.nn.cache import Cache
from zamba2_jax.nn.tap import NO_TAP, Tap
from zamba2_jax.ops.backend import Backend, default_backend
from zamba2_jax.typing import Array, Float, Int

APART = {"xla_gpu_dot_merger_threshold_mb": "0"}
"""Options of the compiler, for programs of the engine alone. docs/xla-notes.md: merged-products"""


def prefill(
    model: LanguageModel,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, " b"] | None = None,
    cache: Cache | None = None,
    *,
    capacity: int | None = None,
    tap: Tap = NO_TAP,
    backend: Backend | None = None,
) -> tuple[Float[Array, "b v"], Cache]:
    """Takes prompts in, or goes on with them.

    Args:
        model: the model.
        tokens: prompts, padded at the end.
        lengths: real tokens in each row, from 1 to t; t by default.
        cache: where the rows stand; empty by default. Pass a prompt in pieces by passing the cache along.
        capacity: tokens each row can hold, only for a new cache; `config.max_position_embeddings`, or t if that is
            more, by default.
        tap: its edits change what flows inside; see `interpret.taps.edits_tap`.
        backend: how ops are computed; `default_backend` by default.

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
    return _prefill(model, tokens, lengths, cache, tap=tap, backend=backend)


def take_in(
    model: LanguageModel,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, " b"] | None,
    cache: Cache,
    tap: Tap = NO_TAP,
    backend: Backend | None = None,
) -> tuple[Float[Array, "b v"], Cache]:
    """`prefill` to be traced, without its checks, its arguments all there."""
    b, t = tokens.shape
    lengths = jnp.full(b, t) if lengths is None else jnp.asarray(lengths)
    padding = (jnp.arange(t) < lengths[:, None]).astype(jnp.int32)
    backend = default_backend(model.dtype) if backend is None else backend
    h, after, *_ = model.run(tokens, padding, cache=cache, tap=tap, backend=backend)
    assert after is not None
    last = jnp.take_along_axis(h, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return _nan_where_full(tap.edits()("logits", model.logits(last, backend=backend)), after), after


_prefill = jax.jit(take_in, static_argnames=("tap", "backend"))
prefill_donated = jax.jit(take_in, static_argnames=("tap", "backend"), donate_argnames="cache", compiler_options=APART)
"""`take_in`, compiled, which takes the cache's memory for the one it returns."""


@partial(jax.jit, static_argnames=("tap", "backend"))
def decode_step(
    model: LanguageModel,
    token: Int[Array, " b"],
    cache: Cache,
    *,
    tap: Tap = NO_TAP,
    backend: Backend | None = None,
) -> tuple[Float[Array, "b v"], Cache]:
    """Logits after one more token in every row, and the cache with it.

    In a row that has outgrown its cache the logits are NaN. `tap` and `backend` as for `prefill`.
    """
    logits, cache = model.step(token, cache, tap=tap, backend=backend)
    return _nan_where_full(logits, cache), cache


def padded_length(tokens: int, most: int) -> int:
    """The length a piece of a row is padded to: a power of two from 16, or `most` if that is less.

    So the pieces of all prompts have few lengths, and few programs are compiled.
    """
    return min(most, max(16, next_power_of_two(tokens)))


def rounded_capacity(tokens: int) -> int:
    """A capacity for so many tokens: one of four in every octave, so that it is at most a quarter more, or 15."""
    step = max(16, next_power_of_two(tokens) // 8)
    return -(-tokens // step) * step


def next_power_of_two(n: int) -> int:
    """The least power of two that is at least n, which is 1 or more."""
    return 1 << (n - 1).bit_length()


def check_tokens(tokens: Sequence[int] | np.ndarray, vocab_size: int, name: str) -> np.ndarray:
    """Token ids as an int32 array.

    Raises:
        ValueError: there are none, or what is there is not ids in [0, vocab_size). The message begins with `name`.
    """
    array = np.asarray(tokens)
    if array.ndim == 1 and not array.size:
        raise ValueError(f"{name} is empty, expected at least one token")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name} is {array.dtype} of shape {array.shape}, expected integers in one row")
    outside = array[(array < 0) | (array >= vocab_size)]
    if outside.size:
        raise ValueError(f"{name} holds token {outside[0]}, expected ids in [0, {vocab_size})")
    return array.astype(np.int32)


def _check_lengths(lengths: Array, b: int, t: int) -> None:
    if np.shape(lengths) != (b,):
        raise ValueError(f"lengths has shape {np.shape(lengths)}, expected {(b,)}")
    traced = isinstance(lengths, jax.core.Tracer)
    if not traced and (np.min(lengths) < 1 or np.max(lengths) > t):
        raise ValueError(f"lengths={np.asarray(lengths)}: expected values in [1, {t}]")


def _nan_where_full(logits: Array, cache: Cache) -> Array:
    """A row past the end of its cache has lost tokens: better no answer than a wrong one."""
    return jnp.where((cache.lengths > cache.capacity)[:, None], jnp.nan, logits)
