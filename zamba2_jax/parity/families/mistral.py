"""Mistral in transformers."""

from transformers.models.mistral import modeling_mistral as mistral

from zamba2_jax.parity.families.transformer import transformer_family

FAMILY = transformer_family(
    mistral.MistralForCausalLM,
    mistral.MistralRMSNorm,
    mistral.MistralDecoderLayer,
    mistral.MistralRotaryEmbedding,
)
