"""Empty caches of a model, and what they take."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from zamba2_jax.models.registry import family_of
from zamba2_jax.nn.cache import Cache, placed
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.typing import DTypeLike


def init_cache(config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike = jnp.float32) -> Cache:
    """An empty cache for `batch` rows of at most `capacity` tokens, in compute dtype `dtype`."""
    model = family_of(config).model()
    cache = Cache(
        layers=tuple(model.layer_state(config, i, batch, capacity, dtype) for i in range(config.num_layers)),
        calls=tuple(model.call_state(config, i, batch, capacity, dtype) for i in range(config.num_calls)),
        lengths=jnp.zeros(batch, jnp.int32),
    )
    return placed(cache)


class CacheBytes(NamedTuple):
    """The size of a cache.

    Attributes:
        constant: bytes that do not depend on the capacity: states of recurrences and convolutions, and the lengths.
        per_token: bytes of the keys and values of one token in every row.
        total: constant + capacity * per_token; less where attention with a sliding window keeps fewer tokens.
    """

    constant: int
    per_token: int
    total: int


def cache_bytes(config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike = jnp.float32) -> CacheBytes:
    """The bytes that `init_cache` takes with the same arguments, without taking them."""

    def measured(capacity: int) -> int:
        cache = jax.eval_shape(lambda: init_cache(config, batch, capacity, dtype))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))

    constant = measured(0)
    return CacheBytes(constant, measured(1) - constant, measured(capacity))
