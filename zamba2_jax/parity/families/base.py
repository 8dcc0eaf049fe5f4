"""What there is to know of a family in transformers, and what several families share of it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from zamba2_jax.nn.config import LayerPlan
from zamba2_jax.parity.states import States


class LayerCall(NamedTuple):
    """One layer and what it is run on, in rows without padding.

    Attributes:
        config: transformers' config.
        module: the layer.
        row: what our plan says of it.
        h: the residual stream before it, [b, t, d].
        embedded: the model's input embeddings, [b, t, d].
        cache: takes the layer's states; none for a pass that is differentiated.
    """

    config: transformers.PretrainedConfig
    module: nn.Module
    row: LayerPlan
    h: torch.Tensor
    embedded: torch.Tensor
    cache: transformers.Cache | None

    def positions(self) -> torch.Tensor:
        """Of the tokens, [1, t]."""
        return torch.arange(self.h.shape[1])[None]

    def causal_mask(self) -> torch.Tensor | None:
        """What the model makes of no padding for its attention; None where that knows itself what is causal."""
        windowed = getattr(self.config, "sliding_window", None) is not None
        make = create_sliding_window_causal_mask if windowed else create_causal_mask
        return make(
            config=self.config,
            inputs_embeds=self.h,
            attention_mask=None,
            past_key_values=None,
            position_ids=self.positions(),
        )


Cached = Callable[[Any, transformers.Cache, int], dict[str, torch.Tensor]]
"""(our architecture, cache, layer) -> the layer's states by the names of `States`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceFamily:
    """A family as transformers has it.

    Where its embeddings, layers and final norm stand is read from the names in its table of weights.

    Attributes:
        model: the class with the output head.
        norm: the class of the final norm.
        settings: keys of config.json that make it the same model: (architecture, chunk size of the scan) -> keys;
            raises ValueError for an architecture that transformers cannot be held to.
        states: what a layer carries.
        cached: the same, in a cache.
        layer: makes a layer by itself, of transformers' config and our plan.
        run: the layer's output.
        unread: whether a parameter of a layer, by its name in it, has no values where the layer stands alone.
        shared: the name, in a hybrid layer, of the block that later layers share; none by default.
    """

    model: type[transformers.PreTrainedModel]
    norm: type[nn.Module]
    settings: Callable[[Any, int], dict[str, Any]]
    states: States
    cached: Cached
    layer: Callable[[Any, LayerPlan], nn.Module]
    run: Callable[[LayerCall], torch.Tensor]
    unread: Callable[[str], bool] = lambda name: False
    shared: str | None = None


def require_no_clamp(config: Any) -> None:
    """The only range of dt that a full pass and a cached step of transformers agree on.

    Raises:
        ValueError: `time_step_limit` bounds dt, which transformers would do in a full pass only.
    """
    if config.time_step_limit != (0.0, math.inf):
        raise ValueError(f"time_step_limit={config.time_step_limit}: transformers can only be held to (0, inf)")


def recurrent_states(config: Any, cache: transformers.Cache, layer: int) -> dict[str, torch.Tensor]:
    """Of a layer with a convolution and a recurrence."""
    return {
        "conv_state": cache.get_conv_state(layer, state_idx=0)[..., 1 - config.d_conv :],
        "ssm_state": cache.get_recurrent_state(layer, state_idx=0),
    }


def keys_and_values(config: Any, cache: transformers.Cache, layer: int) -> dict[str, torch.Tensor]:
    """Of an attention layer."""
    return {"keys": cache.layers[layer].keys, "values": cache.layers[layer].values}
