"""The architecture of a pure Mamba2 language model, as a frozen value."""

import dataclasses
from typing import ClassVar

from zamba2_jax.nn.config import Mamba2Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2LMConfig(Mamba2Config):
    """Architecture of a stack of Mamba2 layers (arXiv:2405.21060), as transformers' `Mamba2ForCausalLM` has it.

    Attributes:
        use_conv_bias: biases of the convolutions.
        residual_in_fp32: the residual stream is held in at least float32, whatever the compute dtype is.
        rms_norm_eps: epsilon of the norms on the residual stream, and of those inside the blocks.

    Raises:
        ValueError: a value breaks a rule; the message names field, value and rule.
    """

    model_type: ClassVar[str] = "mamba2"
    booleans: ClassVar[tuple[str, ...]] = (*Mamba2Config.booleans, "use_conv_bias", "residual_in_fp32")

    vocab_size: int = 50288
    d_state: int = 128
    use_conv_bias: bool = True
    residual_in_fp32: bool = True
    max_position_embeddings: int = 2048
    pad_token_id: int | None = 0
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 0

    @property
    def gated_norm_eps(self) -> float:
        """Epsilon of the norm inside a block."""
        return self.rms_norm_eps
