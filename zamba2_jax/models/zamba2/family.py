"""What the registry has of Zamba2."""

from zamba2_jax.models.registry import family_in
from zamba2_jax.models.zamba2.config import Zamba2Config
from zamba2_jax.models.zamba2.config_json import read_json, write_json
from zamba2_jax.models.zamba2.presets import PRESETS

FAMILY = family_in(
    "zamba2_jax.models.zamba2",
    model="Zamba2",
    config=Zamba2Config,
    presets=PRESETS,
    read_json=read_json,
    write_json=write_json,
)
