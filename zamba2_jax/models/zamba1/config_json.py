"""The config.json of Zamba1: what transformers 4 and 5 have written in, that of transformers 5 out."""

from collections.abc import Sequence
from typing import Any

from zamba2_jax.models.config_json import (
    check_derived,
    check_rest,
    hybrid_layers,
    json_tokens,
    keep_known_tokens,
    take_fields,
)
from zamba2_jax.models.zamba1.config import Zamba1Config
from zamba2_jax.nn.config import require_positive_int

_HF_NAMES = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size",),
    "num_layers": ("num_hidden_layers",),
    "mamba_heads": ("n_mamba_heads",),
    "d_state": ("mamba_d_state",),
    "d_conv": ("mamba_d_conv",),
    "expand": ("mamba_expand",),
    "dt_rank": ("mamba_dt_rank",),
    "use_conv_bias": ("mamba_conv_bias",),
    "use_proj_bias": ("mamba_proj_bias",),
    "time_step_min": ("time_step_min",),
    "time_step_max": ("time_step_max",),
    "time_step_floor": ("time_step_floor",),
    "attention_heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "ffn_size": ("intermediate_size",),
    "rms_norm_eps": ("rms_norm_eps",),
    "tie_embeddings": ("tie_word_embeddings",),
    "initializer_range": ("initializer_range",),
    "max_position_embeddings": ("max_position_embeddings",),
    "pad_token_id": ("pad_token_id",),
    "bos_token_id": ("bos_token_id",),
    "eos_token_id": ("eos_token_id",),
}

# What transformers takes where a file says nothing, and our own defaults do not.
_HF_DEFAULTS = {
    "hidden_size": 3712,
    "num_layers": 76,
    "mamba_heads": 2,
    "attention_heads": 16,
    "kv_heads": 16,
    "ffn_size": 14848,
}

# Keys that would change the numbers, and the only values that leave them as they are.
_HF_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("zamba",),
    "hidden_act": ("gelu",),
    "hidden_mamba_act": ("silu", "swish"),
    "attention_dropout": (0, None),
}

# How others compute.
_HF_IGNORED = frozenset("num_logits_to_keep use_mamba_kernels use_associative_scan".split())

# Values other keys already fix: read only to check that the file agrees with itself.
_HF_DERIVED = {
    "attention_head_dim": lambda c: c.attention_head_dim,
    "head_dim": lambda c: c.attention_head_dim,
    "attention_hidden_size": lambda c: c.attention_size,
}


def read_json(hf: dict[str, Any]) -> Zamba1Config:
    """The architecture that the content of a config.json describes, with transformers' defaults for what it leaves out.

    A key that is unknown and describes something else than the model is left out, with a warning.

    Raises:
        ValueError: a key has a value this model cannot honour, or is unknown and could change what the model computes.
    """
    if hf.get("mamba_dt_rank") == "auto":
        hf["mamba_dt_rank"] = None
    fields = _HF_DEFAULTS | take_fields(hf, _HF_NAMES)
    for field in Zamba1Config.positive_ints:  # other values are derived from them
        if field in fields:
            require_positive_int(field, fields[field])
    keep_known_tokens(fields, fields.get("vocab_size", Zamba1Config.vocab_size))
    fields["hybrid_layer_ids"] = _hybrid_layer_ids(hf, fields["num_layers"])
    fields["num_shared_blocks"] = min(1, len(fields["hybrid_layer_ids"]))
    check_rest(hf, fixed=_HF_FIXED, ignored=_HF_IGNORED | _HF_DERIVED.keys())
    config = Zamba1Config(**fields)
    check_derived(hf, _HF_DERIVED, config)
    return config


def _hybrid_layer_ids(hf: dict[str, Any], num_layers: int) -> Sequence[int]:
    """By the list of layers where there is one; else two plain layers, a hybrid one, and from there by period."""
    period, offset = hf.pop("attn_layer_period", 6), hf.pop("attn_layer_offset", 4)
    listed = hybrid_layers(hf, num_layers)
    if listed is not None:
        return listed
    require_positive_int("attn_layer_period", period)
    return tuple(layer for layer in range(2, num_layers) if layer == 2 or (layer - 3) % period == offset)


def write_json(config: Zamba1Config) -> dict[str, Any]:
    """The config.json of a model, as transformers 5 reads and writes it.

    transformers begins anew from a state of 0 where several tokens follow a cache, lets states decay through padding
    after a text, and, with biases of the in projection, lets them leak out of padding before one.

    Raises:
        ValueError: the architecture is one transformers has no layers for.
    """
    if config.num_shared_blocks > 1:
        raise ValueError(
            f"num_shared_blocks={config.num_shared_blocks} has no Hugging Face form: all calls in transformers' Zamba "
            "are of one block"
        )
    return {
        "architectures": ["ZambaForCausalLM"],
        "model_type": "zamba",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "layers_block_type": ["linear_attention" if row.hybrid is None else "hybrid" for row in config.layer_plan],
        "n_mamba_heads": config.mamba_heads,
        "mamba_d_state": config.d_state,
        "mamba_d_conv": config.d_conv,
        "mamba_expand": config.expand,
        "mamba_dt_rank": config.time_step_rank,
        "mamba_conv_bias": config.use_conv_bias,
        "mamba_proj_bias": config.use_proj_bias,
        "hidden_mamba_act": "silu",
        "time_step_min": config.time_step_min,
        "time_step_max": config.time_step_max,
        "time_step_floor": config.time_step_floor,
        "intermediate_size": config.ffn_size,
        "hidden_act": "gelu",
        "num_attention_heads": config.attention_heads,
        "num_key_value_heads": config.kv_heads,
        "attention_head_dim": config.attention_head_dim,
        "attention_hidden_size": config.attention_size,
        "attention_dropout": 0.0,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_norm_eps,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": json_tokens(config.eos_token_id),
        "tie_word_embeddings": config.tie_embeddings,
    }
