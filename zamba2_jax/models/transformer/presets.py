"""Architectures of dense transformers by name: the published ones, and small ones to test and to learn with."""

from zamba2_jax.models.transformer.config import LlamaConfig, MistralConfig
from zamba2_jax.nn.config import RopeScaling

LLAMA: dict[str, LlamaConfig] = {
    "llama-3-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        num_layers=32,
        attention_heads=32,
        kv_heads=8,
        ffn_size=14336,
        rope_theta=500000.0,
        max_position_embeddings=8192,
        bos_token_id=128000,
        eos_token_id=128001,
    ),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        num_layers=16,
        attention_heads=32,
        kv_heads=8,
        ffn_size=8192,
        tie_embeddings=True,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(
            factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
        ),
        max_position_embeddings=131072,
        bos_token_id=128000,
        eos_token_id=128001,
    ),
    # What Phi-3-mini, whose checkpoints have a model_type of their own, computes up to its window of 2,047 tokens.
    "phi-3-mini-shape": LlamaConfig(
        vocab_size=32064,
        hidden_size=3072,
        num_layers=32,
        attention_heads=32,
        kv_heads=32,
        ffn_size=8192,
        max_position_embeddings=4096,
        pad_token_id=32000,
        eos_token_id=32000,
    ),
    # Of Gemma-7B's sizes: as many products and keys. Its GELU, norms and scaled embeddings are not expressed.
    "gemma-7b-shape": LlamaConfig(
        vocab_size=256000,
        hidden_size=3072,
        num_layers=28,
        attention_heads=16,
        kv_heads=16,
        head_dim=256,
        ffn_size=24576,
        tie_embeddings=True,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    ),
    # For tests: every size differs, so that a swapped axis cannot hide.
    "transformer-tiny": LlamaConfig(
        vocab_size=97,
        hidden_size=24,
        num_layers=3,
        attention_heads=6,
        kv_heads=2,
        head_dim=10,
        ffn_size=40,
        max_position_embeddings=128,
    ),
    # For the demo's text: small enough to learn from on two CPU cores in minutes.
    "transformer-nano": LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        num_layers=4,
        attention_heads=4,
        kv_heads=2,
        ffn_size=384,
        tie_embeddings=True,
        initializer_range=0.05,
        max_position_embeddings=128,
        pad_token_id=0,
    ),
}

MISTRAL: dict[str, MistralConfig] = {
    "mistral-7b-v0.1": MistralConfig(
        hidden_size=4096,
        num_layers=32,
        attention_heads=32,
        kv_heads=8,
        ffn_size=14336,
        sliding_window=4096,
        max_position_embeddings=32768,
    ),
    "mistral-7b-v0.3": MistralConfig(
        vocab_size=32768,
        hidden_size=4096,
        num_layers=32,
        attention_heads=32,
        kv_heads=8,
        ffn_size=14336,
        rope_theta=1000000.0,
        max_position_embeddings=32768,
    ),
}
