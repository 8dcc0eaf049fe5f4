"""What the registry has of Mistral."""

from zamba2_jax.models.transformer.config import MistralConfig
from zamba2_jax.models.transformer.family import family_of_transformers
from zamba2_jax.models.transformer.presets import MISTRAL

FAMILY = family_of_transformers(MistralConfig, MISTRAL)
