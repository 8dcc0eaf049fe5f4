"""The config.json of dense transformers, `llama` and `mistral`: of every version in, that of transformers 5 out."""

import dataclasses
from typing import Any

from zamba2_jax.models.config_json import check_rest, json_tokens, keep_known_tokens, require_fields, take_fields
from zamba2_jax.models.transformer.config import TransformerConfig
from zamba2_jax.nn.config import RopeScaling, is_finite, require

_HF_NAMES = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size",),
    "num_layers": ("num_hidden_layers",),
    "attention_heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "ffn_size": ("intermediate_size",),
    "attention_bias": ("attention_bias",),
    "mlp_bias": ("mlp_bias",),
    "rms_norm_eps": ("rms_norm_eps",),
    "tie_embeddings": ("tie_word_embeddings",),
    "initializer_range": ("initializer_range",),
    "max_position_embeddings": ("max_position_embeddings",),
    "pad_token_id": ("pad_token_id",),
    "bos_token_id": ("bos_token_id",),
    "eos_token_id": ("eos_token_id",),
}

# What a file leaves out has these values in transformers.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "sliding_window": None},
    "mistral": {
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "num_key_value_heads": 8,
    },
}
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}

# Keys that would change the numbers, and the only values that leave them as they are.
_HF_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
}

# Into how many parts a product with a weight was cut.
_HF_IGNORED = frozenset({"pretraining_tp"})


def read_json(kind: type[TransformerConfig], hf: dict[str, Any]) -> TransformerConfig:
    """The architecture, a `kind`, that the content of a config.json describes.

    What it leaves out has the value that it has in transformers. A key that is unknown and describes something else
    than the model is left out, with a warning.

    Raises:
        ValueError: a key is missing, or has a value this model cannot honour, or is unknown and could change what the
            model computes.
    """
    hf = _DEFAULTS[kind.model_type] | hf
    fields = take_fields(hf, _HF_NAMES)
    require_fields(fields, _HF_NAMES, ("hidden_size", "num_layers", "attention_heads", "ffn_size"))
    fields.setdefault("kv_heads", fields["attention_heads"])
    keep_known_tokens(fields, fields.get("vocab_size", kind.vocab_size))
    fields["sliding_window"] = hf.pop("sliding_window")
    length = fields.get("max_position_embeddings", kind.max_position_embeddings)
    fields["rope_theta"], fields["rope_scaling"] = _rope(hf, length)
    check_rest(hf, fixed=_HF_FIXED | {"model_type": (kind.model_type,)}, ignored=_HF_IGNORED)
    return kind(**fields)


def _rope(hf: dict[str, Any], max_position_embeddings: int) -> tuple[float, RopeScaling | None]:
    """The base of the rotary frequencies, and how they are scaled.

    Files of transformers 4 have "rope_theta" and "rope_scaling", those of 5 both in "rope_parameters".
    """
    theta, scaling = hf.pop("rope_theta", None), hf.pop("rope_scaling", None)
    parameters = hf.pop("rope_parameters", None)
    if scaling and parameters and scaling != parameters:
        raise ValueError(f"rope_scaling={scaling} and rope_parameters={parameters} disagree")
    found = dict(scaling or parameters or {})
    kinds = {found.pop(key) for key in ("rope_type", "type") if key in found} or {"default"}
    if kinds not in ({"default"}, {"llama3"}):
        raise ValueError(f"rope_type {', '.join(map(repr, sorted(kinds)))}: expected 'default' or 'llama3'")
    nested = found.pop("rope_theta", None)
    if theta is not None and nested is not None and theta != nested:
        raise ValueError(f"rope_theta={theta} and rope_parameters.rope_theta={nested} disagree")
    theta = next(value for value in (nested, theta, TransformerConfig.rope_theta) if value is not None)
    require(is_finite(theta) and theta > 0, "rope_theta", theta, "a finite number > 0")
    partial = found.pop("partial_rotary_factor", None)
    require(partial in (1, None), "partial_rotary_factor", partial, "1, all of a head being rotated")
    if kinds == {"llama3"}:
        found.setdefault("original_max_position_embeddings", max_position_embeddings)
    names = [field.name for field in dataclasses.fields(RopeScaling)] if kinds == {"llama3"} else []
    if set(found) != set(names):
        expected = ", ".join(names) or "nothing beside rope_theta"
        raise ValueError(f"parameters of rope_type {kinds.pop()!r} are {found}: expected {expected}")
    return float(theta), RopeScaling(**found) if names else None


def write_json(config: TransformerConfig) -> dict[str, Any]:
    """The config.json of a model, as transformers 5 reads and writes it."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
    own: dict[str, dict[str, Any]] = {
        "llama": {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias},
        "mistral": {"sliding_window": config.sliding_window},
    }
    return own[config.model_type] | {
        "architectures": [_ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.attention_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.attention_head_dim,
        "intermediate_size": config.ffn_size,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_parameters": rope,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "max_position_embeddings": config.max_position_embeddings,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": json_tokens(config.eos_token_id),
        "tie_word_embeddings": config.tie_embeddings,
    }
