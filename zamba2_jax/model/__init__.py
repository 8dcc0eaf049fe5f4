"""The model: flax.nnx modules used as pytrees, their math from `zamba2_jax.ops`."""

from zamba2_jax.model.cache import Cache, KVCache, MambaState, init_cache
from zamba2_jax.model.loss import next_token_loss
from zamba2_jax.model.tap import capture, tap_names
from zamba2_jax.model.zamba2 import Zamba2

__all__ = ["Cache", "KVCache", "MambaState", "Zamba2", "capture", "init_cache", "next_token_loss", "tap_names"]
