"""Mamba2: a stack of Mamba2 layers, and nothing else."""

from zamba2_jax.models.base import LanguageModel
from zamba2_jax.models.mamba2.config import Mamba2LMConfig
from zamba2_jax.nn.cache import MambaState
from zamba2_jax.nn.mamba2 import MambaLayer, mamba_state
from zamba2_jax.typing import DTypeLike


class Mamba2LM(LanguageModel):
    """The Mamba2 language model (arXiv:2405.21060)."""

    config: Mamba2LMConfig
    layer = MambaLayer
    mixer_outputs = ("mamba.output",)

    @classmethod
    def layer_state(cls, config: Mamba2LMConfig, layer: int, batch: int, capacity: int, dtype: DTypeLike) -> MambaState:
        """Zeros: the past of convolutions and recurrence."""
        return mamba_state(config, batch, dtype)
