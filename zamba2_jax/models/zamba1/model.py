"""Zamba1: a stack of Mamba1 layers, and a shared transformer block that some of them call."""

from zamba2_jax.models.base import LanguageModel
from zamba2_jax.models.zamba1.config import Zamba1Config
from zamba2_jax.models.zamba2.shared import SharedBlock, SharedCall
from zamba2_jax.nn.cache import KVCache, Mamba1State
from zamba2_jax.nn.mamba1 import Mamba1Layer, mamba1_state
from zamba2_jax.typing import DTypeLike


class Zamba1(LanguageModel):
    """Zamba1 (arXiv:2405.16712)."""

    config: Zamba1Config
    layer = Mamba1Layer
    block = SharedBlock
    call = SharedCall
    mixer_outputs = ("mamba.output",)

    @classmethod
    def layer_state(cls, config: Zamba1Config, layer: int, batch: int, capacity: int, dtype: DTypeLike) -> Mamba1State:
        """Zeros: the past of convolution and recurrence."""
        return mamba1_state(config, batch, dtype)

    @classmethod
    def call_state(cls, config: Zamba1Config, call: int, batch: int, capacity: int, dtype: DTypeLike) -> KVCache:
        """No keys and values yet."""
        return KVCache.zeros(batch, config.kv_heads, capacity, config.attention_head_dim, dtype)
