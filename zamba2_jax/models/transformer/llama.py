"""What the registry has of Llama."""

from zamba2_jax.models.transformer.config import LlamaConfig
from zamba2_jax.models.transformer.family import family_of_transformers
from zamba2_jax.models.transformer.presets import LLAMA

FAMILY = family_of_transformers(LlamaConfig, LLAMA)
