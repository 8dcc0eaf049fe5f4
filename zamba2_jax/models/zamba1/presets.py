"""Architectures of Zamba1 by name: the published one, and small ones to test and to learn with."""

from zamba2_jax.models.zamba1.config import Zamba1Config

PRESETS: dict[str, Zamba1Config] = {
    "zamba-7b-v1": Zamba1Config(
        hidden_size=3712,
        num_layers=76,
        hybrid_layer_ids=(2, *range(7, 74, 6)),
        mamba_heads=2,
        attention_heads=16,
        kv_heads=16,
        ffn_size=14848,
    ),
    # For tests: every size differs, so that a swapped axis cannot hide.
    "zamba1-tiny": Zamba1Config(
        vocab_size=97,
        hidden_size=24,
        num_layers=5,
        hybrid_layer_ids=(1, 3, 4),
        mamba_heads=3,
        d_state=10,
        dt_rank=5,
        attention_heads=4,
        kv_heads=4,
        ffn_size=40,
        max_position_embeddings=128,
    ),
    # For the demo's text: small enough to learn from on two CPU cores in minutes.
    "zamba1-nano": Zamba1Config(
        vocab_size=2048,
        hidden_size=96,
        num_layers=8,
        hybrid_layer_ids=(2, 4, 6),
        mamba_heads=2,
        d_state=16,
        attention_heads=4,
        kv_heads=4,
        ffn_size=256,
        initializer_range=0.05,
        max_position_embeddings=128,
    ),
}
