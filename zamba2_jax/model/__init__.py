"""The model: flax.nnx modules used as pytrees, their math from `zamba2_jax.ops`."""

from zamba2_jax.model.cache import Cache, CacheBytes, KVCache, MambaState, cache_bytes, fork, init_cache
from zamba2_jax.model.loss import next_token_loss
from zamba2_jax.model.tap import capture, tap_names
from zamba2_jax.model.zamba2 import Zamba2

__all__ = [
    "Cache",
    "CacheBytes",
    "KVCache",
    "MambaState",
    "Zamba2",
    "cache_bytes",
    "capture",
    "fork",
    "init_cache",
    "next_token_loss",
    "tap_names",
]
