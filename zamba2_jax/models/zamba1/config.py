"""The architecture of a Zamba1 model, as a frozen value."""

import dataclasses
from typing import ClassVar

from zamba2_jax.nn.config import HybridConfig, Mamba1Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Zamba1Config(HybridConfig, Mamba1Config):
    """Architecture of Zamba1 (arXiv:2405.16712), as transformers' `ZambaForCausalLM` has it.

    Its shared block has no rotary embedding, no adapters and no biases.

    Attributes:
        hidden_size: width d of the residual stream; the shared block sees 2d, [residual, embedding].

    Raises:
        ValueError: a value breaks a rule; the message names field, value and rule.
    """

    model_type: ClassVar[str] = "zamba"
    positive_ints: ClassVar[tuple[str, ...]] = (
        *Mamba1Config.positive_ints,
        *("attention_heads", "kv_heads", "ffn_size"),
    )
