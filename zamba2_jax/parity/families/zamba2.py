"""Zamba2 in transformers, with every trap that would make it another model taken out."""

from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.zamba2 import modeling_zamba2

from zamba2_jax.models.zamba2.config import Zamba2Config
from zamba2_jax.nn.config import LayerPlan
from zamba2_jax.parity.families.base import LayerCall, ReferenceFamily, recurrent_states, require_no_clamp
from zamba2_jax.parity.states import MAMBA2


def _settings(config: Zamba2Config, chunk_size: int) -> dict[str, Any]:
    """transformers 5 clamps dt to `time_step_min` in a full pass. The released models were trained without a clamp."""
    require_no_clamp(config)
    return {"time_step_min": 1e-30, "chunk_size": chunk_size}


def _layer(hf: transformers.Zamba2Config, row: LayerPlan) -> nn.Module:
    layer = modeling_zamba2.Zamba2MambaDecoderLayer(hf, row.layer)
    if row.hybrid is None:
        return layer
    block = modeling_zamba2.Zamba2AttentionDecoderLayer(hf, block_id=row.hybrid.block)
    return modeling_zamba2.Zamba2HybridLayer(block, nn.Linear(hf.hidden_size, hf.hidden_size, bias=False), layer)


def _run(call: LayerCall) -> torch.Tensor:
    rotary = None
    if call.config.use_mem_rope:
        rotary = modeling_zamba2.Zamba2RotaryEmbedding(call.config)(call.h, call.positions())
    return call.module(
        call.h,
        call.embedded,
        call.row.layer,
        causal_mask=call.causal_mask(),
        position_embeddings=rotary,
        past_key_values=call.cache,
    )


FAMILY = ReferenceFamily(
    model=transformers.Zamba2ForCausalLM,
    norm=modeling_zamba2.Zamba2RMSNorm,
    settings=_settings,
    states=MAMBA2,
    cached=recurrent_states,
    layer=_layer,
    run=_run,
    unread=lambda name: "_adapter_list." in name,  # of the block's other calls
    shared="shared_transformer",
)
