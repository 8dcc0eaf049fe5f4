"""The config.json of Zamba2: every published generation in, that of transformers 5 out."""

import math
from collections.abc import Sequence
from typing import Any

from zamba2_jax.models.config_json import (
    check_derived,
    check_rest,
    hybrid_layers,
    json_tokens,
    keep_known_tokens,
    require_fields,
    take_fields,
    take_time_step_limit,
)
from zamba2_jax.models.zamba2.config import LONG_CONTEXT, Zamba2Config, long_context_scale
from zamba2_jax.nn.config import is_finite, require, require_positive_int

# Hugging Face spellings of one value, current name first. The names of the first published files
# (state_size ... lora_rank) and of transformers 4 (mamba_d_state ... adapter_rank) never mean different things.
_HF_NAMES = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size",),
    "num_layers": ("num_hidden_layers",),
    "mamba_heads": ("n_mamba_heads",),
    "d_state": ("mamba_d_state", "state_size"),
    "d_conv": ("mamba_d_conv", "conv_dimension"),
    "expand": ("mamba_expand", "expansion_factor"),
    "ngroups": ("mamba_ngroups",),
    "time_step_min": ("time_step_min",),
    "time_step_max": ("time_step_max",),
    "time_step_floor": ("time_step_floor",),
    "attention_heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "ffn_size": ("intermediate_size", "ffn_hidden_size"),
    "num_shared_blocks": ("num_mem_blocks",),
    "adapter_rank": ("adapter_rank", "lora_rank"),
    "attention_adapters": (
        "use_shared_attention_adapter",
        "use_shared_attention_lora",
        "se_shared_attention_lora",  # a typo of one published repo
    ),
    "use_rope": ("use_mem_rope",),
    "rms_norm_eps": ("rms_norm_eps",),
    "add_bias_linear": ("add_bias_linear",),
    "tie_embeddings": ("tie_word_embeddings",),
    "initializer_range": ("initializer_range",),
    "max_position_embeddings": ("max_position_embeddings",),
    "pad_token_id": ("pad_token_id",),
    "bos_token_id": ("bos_token_id",),
    "eos_token_id": ("eos_token_id",),
}

# Keys that would change the numbers, and the only values that leave them as they are.
_HF_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("zamba2",),
    "hidden_act": ("gelu",),
    "use_conv_bias": (True,),
    "attention_dropout": (0, None),
    "hidden_dropout": (0, None),
    "gated_linear_unit": (True,),
    "use_shared_block_lora": (True,),
    "use_shared_mlp_adapter": (True,),
    "ft_lora": (False,),
    "sliding_window": (None,),
    "rope_scaling": (None,),
    "partial_rotary_factor": (1, None),
}

# Performance hints of other implementations.
_HF_IGNORED = frozenset("num_logits_to_keep use_mamba_kernels use_mem_eff_path chunk_size lora_rank_mamba".split())


def read_json(hf: dict[str, Any]) -> Zamba2Config:
    """The architecture that the content of a config.json of any published generation describes.

    A key that is unknown and describes something else than the model is left out, with a warning.

    Raises:
        ValueError: a key is missing, or has a value this model cannot honour, or is unknown and could change what the
            model computes.
    """
    fields = take_fields(hf, _HF_NAMES)
    require_fields(fields, _HF_NAMES, ("hidden_size", "num_layers", "attention_heads"))
    for field in Zamba2Config.positive_ints:  # other values are derived from them
        if field in fields:
            require_positive_int(field, fields[field])
    keep_known_tokens(fields, fields.get("vocab_size", Zamba2Config.vocab_size))
    fields.setdefault("kv_heads", fields["attention_heads"])
    fields.setdefault("ffn_size", 4 * fields["hidden_size"])
    fields["hybrid_layer_ids"] = _hybrid_layer_ids(hf, fields["num_layers"])
    _resolve_mamba_heads(hf, fields)
    take_time_step_limit(hf, fields)
    _resolve_rope(hf, fields)
    check_rest(hf, fixed=_HF_FIXED, ignored=_HF_IGNORED | _HF_DERIVED.keys())
    config = Zamba2Config(**fields)
    check_derived(hf, _HF_DERIVED, config)
    return config


# Values other keys already fix: read only to check that the file agrees with itself.
_HF_DERIVED = {
    "mamba_headdim": lambda c: c.mamba_head_dim,
    "attention_head_dim": lambda c: c.attention_head_dim,
    "head_dim": lambda c: c.attention_head_dim,
    "attention_hidden_size": lambda c: c.attention_size,
    "kv_channels": lambda c: c.hidden_size // c.attention_heads,
    "num_query_groups": lambda c: c.attention_heads,
}


def _hybrid_layer_ids(hf: dict[str, Any], num_layers: int) -> Sequence[int]:
    from_pattern = hybrid_layers(hf, num_layers)
    ids = hf.pop("hybrid_layer_ids", None)
    if from_pattern is None:
        if ids is None:
            raise ValueError("config has neither 'layers_block_type' nor 'hybrid_layer_ids', expected one")
        return ids
    if ids not in (None, from_pattern, list(from_pattern)):
        raise ValueError(f"hybrid_layer_ids={ids} disagrees with layers_block_type, which gives {list(from_pattern)}")
    return from_pattern


def _resolve_mamba_heads(hf: dict[str, Any], fields: dict[str, Any]) -> None:
    if "mamba_heads" in fields:
        return
    head_dim = hf.get("mamba_headdim")
    if not isinstance(head_dim, int) or head_dim < 1:
        raise ValueError(f"config has no 'n_mamba_heads' and mamba_headdim={head_dim!r}, expected one of them")
    inner_size = fields.get("expand", Zamba2Config.expand) * fields["hidden_size"]
    if inner_size % head_dim:
        raise ValueError(f"mamba_headdim={head_dim}: expected a divisor of expansion * hidden_size = {inner_size}")
    fields["mamba_heads"] = inner_size // head_dim


def _resolve_rope(hf: dict[str, Any], fields: dict[str, Any]) -> None:
    theta = hf.pop("rope_theta", None)
    parameters = dict(hf.pop("rope_parameters", None) or {})
    kind = parameters.pop("rope_type", parameters.pop("type", "default"))
    nested = parameters.pop("rope_theta", None)
    if kind != "default" or parameters:
        found = {"rope_type": kind, **parameters}
        raise ValueError(f"rope_parameters={found}: expected rope_type 'default' and rope_theta only")
    if theta is not None and nested is not None and theta != nested:
        raise ValueError(f"rope_theta={theta} and rope_parameters.rope_theta={nested} disagree")
    theta = next(value for value in (nested, theta, Zamba2Config.rope_theta) if value is not None)
    require(is_finite(theta) and theta > 0, "rope_theta", theta, "a finite number > 0")
    if hf.pop("use_long_context", False):
        # transformers 4 writes the scaled base into config.json, and scales it again at the next load and save;
        # transformers 5 and the published files hold the plain base.
        scale = long_context_scale(2 * fields["hidden_size"] // fields["attention_heads"])
        times = max(1, round(math.log(theta / Zamba2Config.rope_theta) / math.log(scale)))
        saved = math.isclose(theta, Zamba2Config.rope_theta * scale**times, rel_tol=1e-3)
        theta = (Zamba2Config.rope_theta if saved else theta) * scale
        fields["max_position_embeddings"] = LONG_CONTEXT
    fields["rope_theta"] = float(theta)


def write_json(config: Zamba2Config) -> dict[str, Any]:
    """The config.json of a model, as transformers 5 reads and writes it.

    transformers 5 clamps dt to `time_step_min` in a full pass (not in a cached step), whatever `time_step_limit` says.
    A long-context model is written as its scaled `rope_theta` without the `use_long_context` flag, which every reader
    takes the same way.

    Raises:
        ValueError: the architecture is one transformers has no layers for.
    """
    if config.attention_adapters and config.kv_heads != config.attention_heads:
        raise ValueError(
            f"kv_heads={config.kv_heads} with attention_adapters=True has no Hugging Face form: transformers "
            f"gives k and v adapters as many outputs as q (attention_heads={config.attention_heads})"
        )
    low, high = config.time_step_limit
    return {
        "architectures": ["Zamba2ForCausalLM"],
        "model_type": "zamba2",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "layers_block_type": ["linear_attention" if row.hybrid is None else "hybrid" for row in config.layer_plan],
        "mamba_d_state": config.d_state,
        "mamba_d_conv": config.d_conv,
        "mamba_expand": config.expand,
        "mamba_ngroups": config.ngroups,
        "n_mamba_heads": config.mamba_heads,
        "mamba_headdim": config.mamba_head_dim,
        "time_step_min": config.time_step_min,
        "time_step_max": config.time_step_max,
        "time_step_floor": config.time_step_floor,
        "time_step_limit": None if (low, high) == (0.0, math.inf) else [low, "inf" if high == math.inf else high],
        "use_conv_bias": True,
        "add_bias_linear": config.add_bias_linear,
        "intermediate_size": config.ffn_size,
        "hidden_act": "gelu",
        "num_attention_heads": config.attention_heads,
        "num_key_value_heads": config.kv_heads,
        "attention_head_dim": config.attention_head_dim,
        "attention_hidden_size": config.attention_size,
        "attention_dropout": 0.0,
        "num_mem_blocks": config.num_shared_blocks,
        "use_shared_attention_adapter": config.attention_adapters,
        "adapter_rank": config.adapter_rank,
        "use_mem_rope": config.use_rope,
        "use_long_context": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_norm_eps,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": json_tokens(config.eos_token_id),
        "tie_word_embeddings": config.tie_embeddings,
    }
