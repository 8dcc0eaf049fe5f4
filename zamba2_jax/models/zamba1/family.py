"""What the registry has of Zamba1."""

from zamba2_jax.models.registry import family_in
from zamba2_jax.models.zamba1.config import Zamba1Config
from zamba2_jax.models.zamba1.config_json import read_json, write_json
from zamba2_jax.models.zamba1.presets import PRESETS

FAMILY = family_in(
    "zamba2_jax.models.zamba1",
    model="Zamba1",
    config=Zamba1Config,
    presets=PRESETS,
    read_json=read_json,
    write_json=write_json,
)
