"""What the registry has of Mamba2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zamba2_jax.models.mamba2.config import Mamba2LMConfig
from zamba2_jax.models.mamba2.config_json import read_json, write_json
from zamba2_jax.models.mamba2.presets import PRESETS
from zamba2_jax.models.registry import Family

if TYPE_CHECKING:
    from zamba2_jax.models.flops import ForwardFlops
    from zamba2_jax.models.mamba2.model import Mamba2LM
    from zamba2_jax.models.tensors import Tensor


def _model() -> type[Mamba2LM]:
    from zamba2_jax.models.mamba2.model import Mamba2LM

    return Mamba2LM


def _tensors(config: Mamba2LMConfig) -> list[Tensor]:
    from zamba2_jax.models.mamba2.weights import tensors

    return tensors(config)


def _ignored(config: Mamba2LMConfig, name: str) -> bool:
    from zamba2_jax.models.mamba2.weights import ignored

    return ignored(config, name)


def _forward_flops(config: Mamba2LMConfig, length: int) -> ForwardFlops:
    from zamba2_jax.models.mamba2.flops import forward_flops

    return forward_flops(config, length)


FAMILY = Family(
    config=Mamba2LMConfig,
    presets=PRESETS,
    read_json=read_json,
    write_json=write_json,
    model=_model,
    tensors=_tensors,
    ignored=_ignored,
    forward_flops=_forward_flops,
)
