"""What the registry has of Mamba2."""

from zamba2_jax.models.mamba2.config import Mamba2LMConfig
from zamba2_jax.models.mamba2.config_json import read_json, write_json
from zamba2_jax.models.mamba2.presets import PRESETS
from zamba2_jax.models.registry import family_in

FAMILY = family_in(
    "zamba2_jax.models.mamba2",
    model="Mamba2LM",
    config=Mamba2LMConfig,
    presets=PRESETS,
    read_json=read_json,
    write_json=write_json,
)
