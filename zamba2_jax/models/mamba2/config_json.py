"""The config.json of `Mamba2ForCausalLM`: what transformers 4 and 5 have written in, that of transformers 5 out."""

from typing import Any

from zamba2_jax.models.config_json import (
    check_derived,
    check_rest,
    json_float,
    json_tokens,
    keep_known_tokens,
    require_fields,
    take_fields,
    take_time_step_limit,
)
from zamba2_jax.models.mamba2.config import Mamba2LMConfig
from zamba2_jax.nn.config import require_positive_int

_HF_NAMES = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size",),
    "num_layers": ("num_hidden_layers",),
    "mamba_heads": ("num_heads",),
    "d_state": ("state_size",),
    "d_conv": ("conv_kernel",),
    "expand": ("expand",),
    "ngroups": ("n_groups",),
    "rms_norm_eps": ("layer_norm_epsilon",),
    "add_bias_linear": ("use_bias",),
    "use_conv_bias": ("use_conv_bias",),
    "residual_in_fp32": ("residual_in_fp32",),
    "tie_embeddings": ("tie_word_embeddings",),
    "initializer_range": ("initializer_range",),
    "time_step_min": ("time_step_min",),
    "time_step_max": ("time_step_max",),
    "time_step_floor": ("time_step_floor",),
    "max_position_embeddings": ("max_position_embeddings",),  # of no use to transformers, which keeps it
    "pad_token_id": ("pad_token_id",),
    "bos_token_id": ("bos_token_id",),
    "eos_token_id": ("eos_token_id",),
}

# What transformers takes where a file says nothing, and what differs from our own defaults.
_HF_DEFAULTS = {
    "vocab_size": 32768,
    "ngroups": 8,
    "tie_embeddings": False,
    "initializer_range": 0.1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}

# Keys that would change the numbers, and the only values that leave them as they are.
_HF_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("mamba2",),
    "hidden_act": ("silu", "swish"),
    "rms_norm": (True,),
}

# How others compute and initialise. transformers gates before the norm, whatever `norm_before_gate` says: it is true in
# published files of models that were trained so.
_HF_IGNORED = frozenset("chunk_size time_step_rank rescale_prenorm_residual norm_before_gate".split())

# Values other keys already fix: read only to check that the file agrees with itself.
_HF_DERIVED = {
    "head_dim": lambda c: c.mamba_head_dim,
    "intermediate_size": lambda c: c.inner_size,
    "layer_types": lambda c: ["linear_attention"] * c.num_layers,
}


def read_json(hf: dict[str, Any]) -> Mamba2LMConfig:
    """The architecture that the content of a config.json describes, with transformers' defaults for what it leaves out.

    A key that is unknown and describes something else than the model is left out, with a warning.

    Raises:
        ValueError: a key is missing, or has a value this model cannot honour, or is unknown and could change what the
            model computes.
    """
    fields = _HF_DEFAULTS | take_fields(hf, _HF_NAMES)
    require_fields(fields, _HF_NAMES, ("hidden_size", "num_layers", "mamba_heads"))
    for field in Mamba2LMConfig.positive_ints:  # other values are derived from them
        if field in fields:
            require_positive_int(field, fields[field])
    keep_known_tokens(fields, fields["vocab_size"])
    take_time_step_limit(hf, fields)
    check_rest(hf, fixed=_HF_FIXED, ignored=_HF_IGNORED | _HF_DERIVED.keys())
    config = Mamba2LMConfig(**fields)
    check_derived(hf, _HF_DERIVED, config)
    return config


def write_json(config: Mamba2LMConfig) -> dict[str, Any]:
    """The config.json of a model, as transformers 5 reads and writes it.

    transformers clamps dt to `time_step_limit` in a full pass only, and not in a cached step.
    """
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_heads": config.mamba_heads,
        "head_dim": config.mamba_head_dim,
        "state_size": config.d_state,
        "conv_kernel": config.d_conv,
        "expand": config.expand,
        "n_groups": config.ngroups,
        "time_step_min": config.time_step_min,
        "time_step_max": config.time_step_max,
        "time_step_floor": config.time_step_floor,
        "time_step_limit": [json_float(end) for end in config.time_step_limit],
        "use_conv_bias": config.use_conv_bias,
        "use_bias": config.add_bias_linear,
        "hidden_act": "silu",
        "residual_in_fp32": config.residual_in_fp32,
        "initializer_range": config.initializer_range,
        "layer_norm_epsilon": config.rms_norm_eps,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": json_tokens(config.eos_token_id),
        "tie_word_embeddings": config.tie_embeddings,
    }
