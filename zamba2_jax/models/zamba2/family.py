"""What the registry has of Zamba2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zamba2_jax.models.registry import Family
from zamba2_jax.models.zamba2.config import Zamba2Config
from zamba2_jax.models.zamba2.config_json import read_json, write_json
from zamba2_jax.models.zamba2.presets import PRESETS

if TYPE_CHECKING:
    from zamba2_jax.models.flops import ForwardFlops
    from zamba2_jax.models.tensors import Tensor
    from zamba2_jax.models.zamba2.model import Zamba2


def _model() -> type[Zamba2]:
    from zamba2_jax.models.zamba2.model import Zamba2

    return Zamba2


def _tensors(config: Zamba2Config) -> list[Tensor]:
    from zamba2_jax.models.zamba2.weights import tensors

    return tensors(config)


def _ignored(config: Zamba2Config, name: str) -> bool:
    from zamba2_jax.models.zamba2.weights import ignored

    return ignored(config, name)


def _forward_flops(config: Zamba2Config, length: int) -> ForwardFlops:
    from zamba2_jax.models.zamba2.flops import forward_flops

    return forward_flops(config, length)


FAMILY = Family(
    config=Zamba2Config,
    presets=PRESETS,
    read_json=read_json,
    write_json=write_json,
    model=_model,
    tensors=_tensors,
    ignored=_ignored,
    forward_flops=_forward_flops,
)
