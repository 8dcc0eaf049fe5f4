"""The architecture of a Zamba2 model, as a frozen value.

`Zamba2Config` holds what fixes the function the model computes and how it is initialised, and nothing else:
no mesh, no dtype, no kernel choice, no tokenizer. Shapes in the other modules derive from it.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from zamba2_jax.files import read_json

GATED_NORM_EPS = 1e-5
"""Epsilon of the norm inside a Mamba2 block: a constant of the reference, not `rms_norm_eps`."""

LONG_CONTEXT = 16384
"""Context length of the long-context variants."""


class HybridPlan(NamedTuple):
    """What a hybrid layer calls.

    Attributes:
        call: the hybrid ordinal: hybrid layers before this one. It is also the slot of the call's adapters.
        block: which shared block runs, `call % num_shared_blocks`.
    """

    call: int
    block: int


class LayerPlan(NamedTuple):
    """One row of the layer plan.

    Attributes:
        layer: index of the layer.
        hybrid: what the layer calls; None for a plain layer.
    """

    layer: int
    hybrid: HybridPlan | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Zamba2Config:
    """Architecture of Zamba2 (arXiv:2411.15242).

    Attributes:
        hidden_size: width d of the residual stream; the shared blocks see 2d, [residual, embedding].
        num_layers: Mamba2 layers.
        hybrid_layer_ids: layers whose Mamba2 input also gets the output of a shared block, ascending.
        num_shared_blocks: distinct shared blocks, used in turn (ABAB...).
        mamba_heads: SSM heads; `expand * hidden_size` divides among them.
        d_state: SSM state size n, per head channel.
        ngroups: groups of heads that share one B and one C.
        expand: inner width of a Mamba2 block over `hidden_size`.
        d_conv: taps of the causal depthwise convolution.
        time_step_limit: range dt is clamped to, after softplus, in a full pass and in a step alike.
        time_step_min, time_step_max, time_step_floor: dt at initialisation is log-uniform in [min, max],
            then at least floor.
        attention_heads, kv_heads: query heads and key/value heads of a shared block.
        ffn_size: width f of the gated MLP of a shared block.
        adapter_rank: rank of every per-call adapter.
        attention_adapters: whether q, k and v have adapters (the MLP always has).
        use_rope: whether the shared attention rotates q and k.
        rope_theta: base of the rotary frequencies, as used; see `with_long_context`.
        add_bias_linear: biases on the Mamba2 in and out projections and on the MLP.
        tie_embeddings: whether the output head is the embedding.
        initializer_range: standard deviation of the normal initialisation of every matrix.
        max_position_embeddings: the trained context length; nothing in the model stops beyond it.
        eos_token_id: the token that ends a text, or several.

    Raises:
        ValueError: a value breaks a rule; the message names field, value and rule.
    """

    hidden_size: int
    num_layers: int
    hybrid_layer_ids: tuple[int, ...]
    mamba_heads: int
    attention_heads: int
    kv_heads: int
    ffn_size: int
    vocab_size: int = 32000
    num_shared_blocks: int = 1
    d_state: int = 64
    ngroups: int = 1
    expand: int = 2
    d_conv: int = 4
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    adapter_rank: int = 128
    attention_adapters: bool = False
    use_rope: bool = False
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    add_bias_linear: bool = False
    tie_embeddings: bool = True
    initializer_range: float = 0.02
    max_position_embeddings: int = 4096
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2

    def __post_init__(self) -> None:
        for name in ("hybrid_layer_ids", "time_step_limit"):
            value = getattr(self, name)
            _require(isinstance(value, list | tuple), name, value, "a tuple")
            object.__setattr__(self, name, tuple(value))  # a list would not hash
        for name in _POSITIVE_INTS:
            _require_positive_int(name, getattr(self, name))
        for name in _POSITIVE_FLOATS:
            value = getattr(self, name)
            _require(_is_finite(value) and value > 0, name, value, "a finite number > 0")
        for name in _BOOLS:
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            several = name == "eos_token_id" and isinstance(value, tuple)
            valid = value is None or all(self._has_token(id_) for id_ in (value if several else [value]))
            _require(valid, name, value, f"None or an id in [0, vocab_size={self.vocab_size})")
        ids = self.hybrid_layer_ids
        in_range = all(_is_int(i) and 0 <= i < self.num_layers for i in ids)
        _require(in_range, "hybrid_layer_ids", ids, f"layer ids in [0, num_layers={self.num_layers})")
        _require(list(ids) == sorted(set(ids)), "hybrid_layer_ids", ids, "strictly ascending")
        _require(
            self.num_shared_blocks <= len(ids),
            "num_shared_blocks",
            self.num_shared_blocks,
            f"at most the number of hybrid layers, {len(ids)}",
        )
        for whole, part, size in (
            ("expand * hidden_size", "mamba_heads", self.inner_size),
            ("mamba_heads", "ngroups", self.mamba_heads),
            ("2 * hidden_size", "attention_heads", self.attention_size),
            ("attention_heads", "kv_heads", self.attention_heads),
        ):
            value = getattr(self, part)
            _require(size % value == 0, part, value, f"a divisor of {whole} = {size}")
        even = not self.use_rope or self.attention_head_dim % 2 == 0
        rule = f"2 * hidden_size / attention_heads = {self.attention_head_dim} to be even with use_rope"
        _require(even, "attention_heads", self.attention_heads, rule)
        limit = self.time_step_limit
        numbers = len(limit) == 2 and all(isinstance(value, int | float) for value in limit)
        _require(numbers and 0 <= limit[0] < limit[1], "time_step_limit", limit, "two numbers, 0 <= low < high")
        _require(
            self.time_step_min <= self.time_step_max,
            "time_step_min",
            self.time_step_min,
            f"at most time_step_max = {self.time_step_max}",
        )

    def _has_token(self, id_: object) -> bool:
        return isinstance(id_, int) and _is_int(id_) and 0 <= id_ < self.vocab_size

    @property
    def inner_size(self) -> int:
        """Width e of the Mamba2 blocks: heads times head dim."""
        return self.expand * self.hidden_size

    @property
    def mamba_head_dim(self) -> int:
        """Channels p of one SSM head."""
        return self.inner_size // self.mamba_heads

    @property
    def bc_size(self) -> int:
        """Channels of B and C together, 2 * ngroups * d_state."""
        return 2 * self.ngroups * self.d_state

    @property
    def attention_size(self) -> int:
        """Width of a shared block's input, [residual, embedding], and of its queries."""
        return 2 * self.hidden_size

    @property
    def attention_head_dim(self) -> int:
        """Channels of one attention head."""
        return self.attention_size // self.attention_heads

    @property
    def kv_size(self) -> int:
        """Width of a shared block's keys, and of its values."""
        return self.kv_heads * self.attention_head_dim

    @property
    def attention_scale(self) -> float:
        """Factor on the attention scores, (head_dim / 2)^-0.5: half the input is the embedding."""
        return (self.attention_head_dim / 2) ** -0.5

    @property
    def num_calls(self) -> int:
        """How many times a shared block runs: the number of hybrid layers."""
        return len(self.hybrid_layer_ids)

    @cached_property
    def layer_plan(self) -> tuple[LayerPlan, ...]:
        """For each layer in order, what runs there. Model, checkpoint reader and cache all read this table."""
        hybrids = {
            layer: HybridPlan(call, call % self.num_shared_blocks) for call, layer in enumerate(self.hybrid_layer_ids)
        }
        return tuple(LayerPlan(layer, hybrids.get(layer)) for layer in range(self.num_layers))

    def with_long_context(self) -> "Zamba2Config":
        """The same model with the rotary base of the long-context variant, theta * 8^(D / (D - 2)), D the head dim.

        Apply it once. Zyphra's fork and transformers 4 do the same when `use_long_context` is set;
        transformers 5 keeps the short base.
        """
        theta = self.rope_theta * _long_context_scale(self.attention_head_dim)
        return dataclasses.replace(self, rope_theta=theta, max_position_embeddings=LONG_CONTEXT)

    @classmethod
    def preset(cls, name: str) -> "Zamba2Config":
        """The named configuration; `PRESETS` lists them.

        Raises:
            ValueError: no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown, expected one of {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> "Zamba2Config":
        """Reads a Hugging Face config of any published generation.

        Args:
            source: a config.json, the directory that holds it, or its parsed content.

        A key that is unknown and describes something else than the model is left out, with a warning.

        Raises:
            FileNotFoundError: there is no config.json.
            ValueError: a key is missing, or has a value this model cannot honour, or is unknown and could change what
                the model computes.
        """
        if isinstance(source, Mapping):
            return _from_hf(dict(source))
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no config.json at {path}")
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds {type(values).__name__}, expected a JSON object")
        return _from_hf(values)

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this model, as transformers 5 reads and writes it.

        transformers 5 clamps dt to `time_step_min` in a full pass (not in a cached step), whatever
        `time_step_limit` says. A long-context model is written as its scaled `rope_theta` without the
        `use_long_context` flag, which every reader takes the same way.

        Raises:
            ValueError: the architecture is one transformers has no layers for.
        """
        if self.attention_adapters and self.kv_heads != self.attention_heads:
            raise ValueError(
                f"kv_heads={self.kv_heads} with attention_adapters=True has no Hugging Face form: transformers "
                f"gives k and v adapters as many outputs as q (attention_heads={self.attention_heads})"
            )
        low, high = self.time_step_limit
        return {
            "architectures": ["Zamba2ForCausalLM"],
            "model_type": "zamba2",
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "layers_block_type": ["linear_attention" if row.hybrid is None else "hybrid" for row in self.layer_plan],
            "mamba_d_state": self.d_state,
            "mamba_d_conv": self.d_conv,
            "mamba_expand": self.expand,
            "mamba_ngroups": self.ngroups,
            "n_mamba_heads": self.mamba_heads,
            "mamba_headdim": self.mamba_head_dim,
            "time_step_min": self.time_step_min,
            "time_step_max": self.time_step_max,
            "time_step_floor": self.time_step_floor,
            "time_step_limit": None if (low, high) == (0.0, math.inf) else [low, "inf" if high == math.inf else high],
            "use_conv_bias": True,
            "add_bias_linear": self.add_bias_linear,
            "intermediate_size": self.ffn_size,
            "hidden_act": "gelu",
            "num_attention_heads": self.attention_heads,
            "num_key_value_heads": self.kv_heads,
            "attention_head_dim": self.attention_head_dim,
            "attention_hidden_size": self.attention_size,
            "attention_dropout": 0.0,
            "num_mem_blocks": self.num_shared_blocks,
            "use_shared_attention_adapter": self.attention_adapters,
            "adapter_rank": self.adapter_rank,
            "use_mem_rope": self.use_rope,
            "use_long_context": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "initializer_range": self.initializer_range,
            "rms_norm_eps": self.rms_norm_eps,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id,
            "tie_word_embeddings": self.tie_embeddings,
        }


_POSITIVE_INTS = (
    "vocab_size hidden_size num_layers num_shared_blocks mamba_heads d_state ngroups expand d_conv "
    "attention_heads kv_heads ffn_size adapter_rank max_position_embeddings"
).split()
_POSITIVE_FLOATS = ("time_step_min time_step_max time_step_floor rope_theta rms_norm_eps initializer_range").split()
_BOOLS = "attention_adapters use_rope add_bias_linear tie_embeddings".split()


def _require(valid: bool, field: str, value: object, rule: str) -> None:
    if not valid:
        raise ValueError(f"{field}={value!r}: expected {rule}")


def _require_positive_int(field: str, value: Any) -> None:
    _require(_is_int(value) and value >= 1, field, value, "an integer >= 1")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _long_context_scale(head_dim: int) -> float:
    return float(8.0 ** (head_dim / (head_dim - 2)))


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
    "quantization_config": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
}

# Keys with no bearing on the numbers: performance hints of other implementations, generation and bookkeeping.
_HF_IGNORED = frozenset(
    """
    architectures auto_map dtype torch_dtype transformers_version _name_or_path _attn_implementation
    _attn_implementation_autoset _commit_hash attn_implementation name_or_path
    use_cache num_logits_to_keep use_mamba_kernels use_mem_eff_path chunk_size lora_rank_mamba
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate torchscript use_bfloat16
    chunk_size_feed_forward problem_type id2label label2id num_labels task_specific_params tokenizer_class prefix
    tf_legacy_loss finetuning_task cross_attention_hidden_size is_decoder tie_encoder_decoder sep_token_id
    decoder_start_token_id max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()
)


# Words of architectures and of how they are computed. An unknown key that has one of them is refused; one without is a
# note of some tool or person.
_MODEL_WORDS = frozenset(
    """
    hidden size sizes layer layers head heads dim dims width depth norm norms layernorm rms eps epsilon act activation
    attn attention mamba mamba2 ssm conv conv1d kernel rope rotary theta bias dropout scale scaling factor init
    initializer range mlp ffn ff intermediate expert experts moe router routing topk window sliding local global chunk
    embedding embeddings embed position positions positional max mem memory block blocks shared share adapter adapters
    lora rank state states group groups query key value kv qkv q k v o logit logits softcap softcapping cap residual
    multiplier tie tied untie vocab dt time gate gated gating flash mode use num n expand expansion parallel sparse
    dense alibi mup quantization quant quantized bits float16 bfloat16 fp16 fp8 int8 pretraining attn_mode causal
    bidirectional mask recurrent delta proj projection
    """.split()
)
# Known notes whose names have such words.
_NOTES = frozenset("model_max_length pretraining_tp".split())


def _could_change_numbers(key: str) -> bool:
    return key not in _NOTES and not _MODEL_WORDS.isdisjoint(key.lower().strip("_").split("_"))


def _from_hf(hf: dict[str, Any]) -> Zamba2Config:
    fields: dict[str, Any] = {}
    for field, names in _HF_NAMES.items():
        found = {name: hf.pop(name) for name in names if name in hf}
        values = list(found.values())
        if any(value != values[0] for value in values):
            raise ValueError(f"config keys {found} name one value and disagree")
        if values and (values[0] is not None or field.endswith("_token_id")):
            fields[field] = values[0]
    for required in ("hidden_size", "num_layers", "attention_heads"):
        if required not in fields:
            raise ValueError(f"config has no {_HF_NAMES[required][0]!r}, expected an integer")
    for field in _POSITIVE_INTS:  # other values are derived from them
        if field in fields:
            _require_positive_int(field, fields[field])
    vocab_size = fields.get("vocab_size", Zamba2Config.vocab_size)
    for token in {"pad_token_id", "bos_token_id", "eos_token_id"} & set(fields):
        # Some published files name ids just past the embedding (32001, 32002), or -1: no such token can be fed.
        value = fields[token]
        listed = value if isinstance(value, list) and token == "eos_token_id" else [value]
        known = [id_ for id_ in listed if not isinstance(id_, int) or 0 <= id_ < vocab_size]
        fields[token] = known[0] if len(known) == 1 else tuple(known) or None
    fields.setdefault("kv_heads", fields["attention_heads"])
    fields.setdefault("ffn_size", 4 * fields["hidden_size"])
    fields["hybrid_layer_ids"] = _hybrid_layer_ids(hf, fields["num_layers"])
    _resolve_mamba_heads(hf, fields)
    _resolve_time_step_limit(hf, fields)
    _resolve_rope(hf, fields)
    for key, allowed in _HF_FIXED.items():
        if key in hf and hf.pop(key) not in allowed:
            raise ValueError(f"config key {key!r} has a value this model does not support, expected {allowed[0]!r}")
    unknown = sorted(key for key in hf if key not in _HF_IGNORED and key not in _HF_DERIVED and hf[key] is not None)
    unsafe = [key for key in unknown if _could_change_numbers(key)]
    if unsafe:
        raise ValueError(f"config keys {unsafe} are unknown and could change what the model computes")
    if unknown:
        warnings.warn(f"config keys {unknown} are unknown and left out: they do not describe the model", stacklevel=3)
    config = Zamba2Config(**fields)
    for key, derive in _HF_DERIVED.items():
        if hf.get(key) is not None and hf[key] != derive(config):
            raise ValueError(f"config key {key!r} is {hf[key]!r}, but the other keys make it {derive(config)!r}")
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
    pattern = hf.pop("layers_block_type", None)
    pattern = hf.pop("layer_types", None) if pattern is None else pattern
    ids = hf.pop("hybrid_layer_ids", None)
    if pattern is None:
        if ids is None:
            raise ValueError("config has neither 'layers_block_type' nor 'hybrid_layer_ids', expected one")
        return ids
    if not isinstance(pattern, list | tuple):
        raise ValueError(f"layers_block_type={pattern!r}: expected a list")
    if len(pattern) != num_layers:
        raise ValueError(f"layers_block_type has {len(pattern)} entries, expected num_hidden_layers = {num_layers}")
    plain, hybrid = {"m", "mamba", "mamba2", "linear_attention"}, {"g", "hybrid"}
    unknown = sorted({repr(kind) for kind in pattern if kind not in plain | hybrid})
    if unknown:
        raise ValueError(f"layers_block_type holds {', '.join(unknown)}, expected {sorted(plain | hybrid)}")
    from_pattern = tuple(layer for layer, kind in enumerate(pattern) if kind in hybrid)
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


def _resolve_time_step_limit(hf: dict[str, Any], fields: dict[str, Any]) -> None:
    limit = hf.pop("time_step_limit", None)
    if limit is None:
        return
    if not isinstance(limit, list | tuple) or len(limit) != 2:
        raise ValueError(f"time_step_limit={limit!r}: expected null or two numbers")
    try:
        fields["time_step_limit"] = (float(limit[0]), float(limit[1]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"time_step_limit={limit!r}: expected null or two numbers") from error


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
    _require(_is_finite(theta) and theta > 0, "rope_theta", theta, "a finite number > 0")
    if hf.pop("use_long_context", False):
        # transformers 4 writes the scaled base into config.json, and scales it again at the next load and save;
        # transformers 5 and the published files hold the plain base.
        scale = _long_context_scale(2 * fields["hidden_size"] // fields["attention_heads"])
        times = max(1, round(math.log(theta / Zamba2Config.rope_theta) / math.log(scale)))
        saved = math.isclose(theta, Zamba2Config.rope_theta * scale**times, rel_tol=1e-3)
        theta = (Zamba2Config.rope_theta if saved else theta) * scale
        fields["max_position_embeddings"] = LONG_CONTEXT
    fields["rope_theta"] = float(theta)


PRESETS: dict[str, Zamba2Config] = {
    "zamba2-1.2b": Zamba2Config(
        hidden_size=2048,
        num_layers=38,
        hybrid_layer_ids=tuple(range(5, 36, 6)),
        num_shared_blocks=1,
        mamba_heads=64,
        d_state=128,
        ngroups=1,
        attention_heads=32,
        kv_heads=32,
        ffn_size=8192,
        attention_adapters=True,
        use_rope=True,
    ),
    "zamba2-2.7b": Zamba2Config(
        hidden_size=2560,
        num_layers=54,
        hybrid_layer_ids=(*range(6, 43, 6), 47, 51),
        num_shared_blocks=2,
        mamba_heads=80,
        d_state=64,
        ngroups=1,
        attention_heads=32,
        kv_heads=32,
        ffn_size=10240,
    ),
    "zamba2-7b": Zamba2Config(
        hidden_size=3584,
        num_layers=81,
        hybrid_layer_ids=(6, *range(11, 78, 6)),
        num_shared_blocks=2,
        mamba_heads=112,
        d_state=64,
        ngroups=2,
        attention_heads=32,
        kv_heads=32,
        ffn_size=14336,
        use_rope=True,
    ),
    # For tests: every size differs, so that a swapped axis cannot hide.
    "zamba2-tiny": Zamba2Config(
        vocab_size=97,
        hidden_size=24,
        num_layers=7,
        hybrid_layer_ids=(1, 3, 4),
        num_shared_blocks=2,
        mamba_heads=6,
        d_state=10,
        ngroups=2,
        attention_heads=4,
        kv_heads=4,
        ffn_size=40,
        adapter_rank=5,
        attention_adapters=True,
        use_rope=True,
        max_position_embeddings=128,
    ),
    # For the demo: small enough to learn from on two CPU cores in minutes.
    "zamba2-nano": Zamba2Config(
        vocab_size=2048,
        hidden_size=96,
        num_layers=5,
        hybrid_layer_ids=(1, 2, 3, 4),
        num_shared_blocks=2,
        mamba_heads=4,
        d_state=32,
        ngroups=1,
        attention_heads=4,
        kv_heads=4,
        ffn_size=256,
        adapter_rank=8,
        attention_adapters=True,
        use_rope=True,
        initializer_range=0.05,
        max_position_embeddings=128,
    ),
}
