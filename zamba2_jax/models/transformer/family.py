"""What the registry has of dense transformers: one model, and a family for each `model_type` of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from zamba2_jax.models.registry import Family
from zamba2_jax.models.transformer.config import TransformerConfig
from zamba2_jax.models.transformer.config_json import read_json, write_json

if TYPE_CHECKING:
    from zamba2_jax.models.flops import ForwardFlops
    from zamba2_jax.models.tensors import Tensor
    from zamba2_jax.models.transformer.model import Transformer


def _model() -> type[Transformer]:
    from zamba2_jax.models.transformer.model import Transformer

    return Transformer


def _tensors(config: TransformerConfig) -> list[Tensor]:
    from zamba2_jax.models.transformer.weights import tensors

    return tensors(config)


def _ignored(config: TransformerConfig, name: str) -> bool:
    from zamba2_jax.models.transformer.weights import ignored

    return ignored(config, name)


def _forward_flops(config: TransformerConfig, length: int) -> ForwardFlops:
    from zamba2_jax.models.transformer.flops import forward_flops

    return forward_flops(config, length)


def family_of_transformers(config: type[TransformerConfig], presets: Mapping[str, TransformerConfig]) -> Family:
    """The family of the checkpoints whose architecture is a `config`."""
    return Family(
        config=config,
        presets=presets,
        read_json=partial(read_json, config),
        write_json=write_json,
        model=_model,
        tensors=_tensors,
        ignored=_ignored,
        forward_flops=_forward_flops,
    )
