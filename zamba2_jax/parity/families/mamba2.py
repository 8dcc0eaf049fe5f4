"""Mamba2 in transformers."""

from typing import Any

import torch
import transformers
from transformers.models.mamba2 import modeling_mamba2

from zamba2_jax.models.mamba2.config import Mamba2LMConfig
from zamba2_jax.parity.families.base import LayerCall, ReferenceFamily, recurrent_states, require_no_clamp
from zamba2_jax.parity.states import MAMBA2


def _settings(config: Mamba2LMConfig, chunk_size: int) -> dict[str, Any]:
    require_no_clamp(config)
    return {"time_step_limit": config.time_step_limit, "chunk_size": chunk_size}


def _run(call: LayerCall) -> torch.Tensor:
    return call.module(call.h, cache_params=call.cache)


FAMILY = ReferenceFamily(
    model=transformers.Mamba2ForCausalLM,
    norm=modeling_mamba2.Mamba2RMSNorm,
    settings=_settings,
    states=MAMBA2,
    cached=recurrent_states,
    layer=lambda hf, row: modeling_mamba2.Mamba2Block(hf, row.layer),
    run=_run,
)
