"""The architecture of a dense transformer, as a frozen value; a class for each name that checkpoints have for it."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from zamba2_jax.nn.config import AttentionConfig, require, require_divisor


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(AttentionConfig):
    """Attention and a gated MLP in every layer, each with an RMS norm before and a residual connection around it.

    Attributes:
        ffn_size: width f of the MLP.
        mlp_bias: biases on the projections of the MLP.

    Raises:
        ValueError: a value breaks a rule; the message names field, value and rule.
    """

    positive_ints: ClassVar[tuple[str, ...]] = (*AttentionConfig.positive_ints, "ffn_size")
    booleans: ClassVar[tuple[str, ...]] = (*AttentionConfig.booleans, "mlp_bias")

    ffn_size: int
    mlp_bias: bool = False
    tie_embeddings: bool = False
    pad_token_id: int | None = None

    def mesh_sizes(self) -> Mapping[tuple[str, str], int]:
        """Also the width of the MLP."""
        return {**super().mesh_sizes(), ("ffn", "FFN width"): self.ffn_size}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(TransformerConfig):
    """What a `llama` checkpoint can be: no sliding window; and transformers wants heads that divide the width."""

    model_type: ClassVar[str] = "llama"

    def __post_init__(self) -> None:
        super().__post_init__()
        window = self.sliding_window
        require(window is None, "sliding_window", window, "None in a llama model; a mistral model may have one")
        require_divisor(self, "attention_heads", "hidden_size", self.hidden_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MistralConfig(TransformerConfig):
    """What a `mistral` checkpoint can be: no biases."""

    model_type: ClassVar[str] = "mistral"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("attention_bias", "mlp_bias"):
            value = getattr(self, name)
            require(not value, name, value, "false in a mistral model; a llama model may have them")
