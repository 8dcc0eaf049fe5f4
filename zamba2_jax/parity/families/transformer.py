"""What dense transformers of transformers have in common: each model_type has classes of its own for one model."""

from typing import Any

import torch
import transformers
from torch import nn

from zamba2_jax.parity.families.base import LayerCall, ReferenceFamily, keys_and_values
from zamba2_jax.parity.states import ATTENTION


def transformer_family(
    model: type[transformers.PreTrainedModel], norm: type[nn.Module], layer: type[nn.Module], rotary: type[nn.Module]
) -> ReferenceFamily:
    """The family whose model, final norm, layer and rotary embedding are these classes."""

    def run(call: LayerCall) -> torch.Tensor:
        positions = call.positions()
        return call.module(
            call.h,
            attention_mask=call.causal_mask(),
            position_ids=positions,
            position_embeddings=rotary(call.config)(call.h, positions),
            past_key_values=call.cache,
        )

    def settings(config: Any, chunk_size: int) -> dict[str, Any]:
        return {}

    return ReferenceFamily(
        model=model,
        norm=norm,
        settings=settings,
        states=ATTENTION,
        cached=keys_and_values,
        layer=lambda hf, row: layer(hf, row.layer),
        run=run,
    )
