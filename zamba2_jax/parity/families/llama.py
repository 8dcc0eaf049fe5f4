"""Llama in transformers."""

from transformers.models.llama import modeling_llama as llama

from zamba2_jax.parity.families.transformer import transformer_family

FAMILY = transformer_family(
    llama.LlamaForCausalLM, llama.LlamaRMSNorm, llama.LlamaDecoderLayer, llama.LlamaRotaryEmbedding
)
