"""What the registry has of dense transformers: one model, and a family for each `model_type` of its checkpoints."""

from collections.abc import Mapping
from functools import partial

from zamba2_jax.models.registry import Family, family_in
from zamba2_jax.models.transformer.config import TransformerConfig
from zamba2_jax.models.transformer.config_json import read_json, write_json


def family_of_transformers(config: type[TransformerConfig], presets: Mapping[str, TransformerConfig]) -> Family:
    """The family of the checkpoints whose architecture is a `config`."""
    return family_in(
        "zamba2_jax.models.transformer",
        model="Transformer",
        config=config,
        presets=presets,
        read_json=partial(read_json, config),
        write_json=write_json,
    )
