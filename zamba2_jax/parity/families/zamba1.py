"""Zamba1 in transformers, "zamba" there."""

from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.zamba import modeling_zamba

from zamba2_jax.nn.config import LayerPlan
from zamba2_jax.parity.families.base import LayerCall, ReferenceFamily, recurrent_states
from zamba2_jax.parity.states import MAMBA1


def _settings(config: Any, chunk_size: int) -> dict[str, Any]:
    return {}


def _layer(hf: transformers.ZambaConfig, row: LayerPlan) -> nn.Module:
    layer = modeling_zamba.ZambaMambaDecoderLayer(hf, row.layer)
    if row.hybrid is None:
        return layer
    block = modeling_zamba.ZambaAttentionDecoderLayer(hf)
    return modeling_zamba.ZambaHybridLayer(block, nn.Linear(hf.hidden_size, hf.hidden_size, bias=False), layer)


def _run(call: LayerCall) -> torch.Tensor:
    return call.module(
        call.h, call.embedded, call.row.layer, causal_mask=call.causal_mask(), past_key_values=call.cache
    )


FAMILY = ReferenceFamily(
    model=transformers.ZambaForCausalLM,
    norm=modeling_zamba.ZambaRMSNorm,
    settings=_settings,
    states=MAMBA1,
    cached=recurrent_states,
    layer=_layer,
    run=_run,
    shared="shared_transf",
)
