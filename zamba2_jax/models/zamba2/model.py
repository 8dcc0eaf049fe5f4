"""Zamba2: a stack of Mamba2 layers, and shared transformer blocks that some of them call."""

from zamba2_jax.models.base import LanguageModel
from zamba2_jax.models.zamba2.config import Zamba2Config
from zamba2_jax.models.zamba2.shared import SharedBlock, SharedCall
from zamba2_jax.nn.cache import KVCache, MambaState
from zamba2_jax.nn.mamba2 import MambaLayer, mamba_state
from zamba2_jax.typing import DTypeLike


class Zamba2(LanguageModel):
    """Zamba2 (arXiv:2411.15242)."""

    config: Zamba2Config
    layer = MambaLayer
    block = SharedBlock
    call = SharedCall
    mixer_outputs = ("mamba.output",)

    @classmethod
    def layer_state(cls, config: Zamba2Config, layer: int, batch: int, capacity: int, dtype: DTypeLike) -> MambaState:
        """Zeros: the past of convolutions and recurrence."""
        return mamba_state(config, batch, dtype)

    @classmethod
    def call_state(cls, config: Zamba2Config, call: int, batch: int, capacity: int, dtype: DTypeLike) -> KVCache:
        """No keys and values yet."""
        return KVCache.zeros(batch, config.kv_heads, capacity, config.attention_head_dim, dtype)
