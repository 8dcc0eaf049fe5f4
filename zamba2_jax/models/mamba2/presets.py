"""Architectures of Mamba2 by name: the published ones, and small ones to test and to learn with."""

from zamba2_jax.models.mamba2.config import Mamba2LMConfig

# state-spaces/mamba2-130m to -2.7b, as transformers' converter writes them: 50,280 tokens filled up to a multiple of
# 16, all special tokens 0. Its 0.1 for `initializer_range` is not what they began with; mamba_ssm's embedding has 0.02.
PRESETS: dict[str, Mamba2LMConfig] = {
    "mamba2-130m": Mamba2LMConfig(hidden_size=768, num_layers=24, mamba_heads=24),
    "mamba2-370m": Mamba2LMConfig(hidden_size=1024, num_layers=48, mamba_heads=32),
    "mamba2-780m": Mamba2LMConfig(hidden_size=1536, num_layers=48, mamba_heads=48),
    "mamba2-1.3b": Mamba2LMConfig(hidden_size=2048, num_layers=48, mamba_heads=64),
    "mamba2-2.7b": Mamba2LMConfig(hidden_size=2560, num_layers=64, mamba_heads=80),
    # For tests: every size differs, so that a swapped axis cannot hide.
    "mamba2-tiny": Mamba2LMConfig(
        vocab_size=97,
        hidden_size=24,
        num_layers=3,
        mamba_heads=6,
        d_state=10,
        ngroups=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    ),
    # For the demo's text: small enough to learn from on two CPU cores in minutes.
    "mamba2-nano": Mamba2LMConfig(
        vocab_size=2048,
        hidden_size=128,
        num_layers=7,
        mamba_heads=8,
        d_state=32,
        initializer_range=0.05,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
