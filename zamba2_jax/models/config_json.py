"""What the readers of config.json of all families share.

A reader takes what it knows out of the content, step by step; what is left at the end has no bearing on the numbers,
or is refused.
"""

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from zamba2_jax.nn.config import ModelConfig

FIXED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
}
"""Keys of any transformers config that would change the numbers, and the only values that leave them as they are."""

IGNORED = frozenset(
    """
    architectures auto_map dtype torch_dtype transformers_version _name_or_path _attn_implementation
    _attn_implementation_autoset _commit_hash attn_implementation name_or_path use_cache
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate torchscript use_bfloat16
    chunk_size_feed_forward problem_type id2label label2id num_labels task_specific_params tokenizer_class prefix
    tf_legacy_loss finetuning_task cross_attention_hidden_size is_decoder tie_encoder_decoder sep_token_id
    decoder_start_token_id max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()
)
"""Keys of any transformers config with no bearing on the numbers: generation and bookkeeping."""

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


def take_fields(hf: dict[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Takes the values of fields out of the content of a config.json. A null is left out, but for special tokens.

    Args:
        hf: the content.
        names: by field, the keys that it may stand under.

    Raises:
        ValueError: two keys of one field disagree.
    """
    fields: dict[str, Any] = {}
    for field, keys in names.items():
        found = {key: hf.pop(key) for key in keys if key in hf}
        values = list(found.values())
        if any(value != values[0] for value in values):
            raise ValueError(f"config keys {found} name one value and disagree")
        if values and (values[0] is not None or field.endswith("_token_id")):
            fields[field] = values[0]
    return fields


def require_fields(fields: Mapping[str, Any], names: Mapping[str, Sequence[str]], required: Sequence[str]) -> None:
    """Whether integers without which there is no architecture are there.

    Raises:
        ValueError: one is missing.
    """
    for field in required:
        if field not in fields:
            raise ValueError(f"config has no {names[field][0]!r}, expected an integer")


def keep_known_tokens(fields: dict[str, Any], vocab_size: int) -> None:
    """Leaves special tokens out that are not in the vocabulary.

    Some published files name ids just past the embedding (32001, 32002), or -1: no such token can be fed.
    """
    for token in {"pad_token_id", "bos_token_id", "eos_token_id"} & set(fields):
        value = fields[token]
        listed = value if isinstance(value, list) and token == "eos_token_id" else [value]
        known = [id_ for id_ in listed if not isinstance(id_, int) or 0 <= id_ < vocab_size]
        fields[token] = known[0] if len(known) == 1 else tuple(known) or None


def take_time_step_limit(hf: dict[str, Any], fields: dict[str, Any]) -> None:
    """Takes the range that dt is clamped to; infinity as a number, as its name, or as transformers 5 writes it.

    Raises:
        ValueError: it is not two numbers.
    """
    limit = hf.pop("time_step_limit", None)
    if limit is None:
        return
    if not isinstance(limit, list | tuple) or len(limit) != 2:
        raise ValueError(f"time_step_limit={limit!r}: expected null or two numbers")
    try:
        low, high = (float(end["__float__"] if isinstance(end, dict) else end) for end in limit)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"time_step_limit={limit!r}: expected null or two numbers") from error
    fields["time_step_limit"] = (low, high)


def hybrid_layers(hf: dict[str, Any], num_layers: int) -> tuple[int, ...] | None:
    """Takes the list of the kinds of layers: those that call a shared block; None where there is no list.

    Raises:
        ValueError: it is not a list of known kinds, one for each layer.
    """
    pattern = hf.pop("layers_block_type", None)
    pattern = hf.pop("layer_types", None) if pattern is None else pattern
    if pattern is None:
        return None
    if not isinstance(pattern, list | tuple):
        raise ValueError(f"layers_block_type={pattern!r}: expected a list")
    if len(pattern) != num_layers:
        raise ValueError(f"layers_block_type has {len(pattern)} entries, expected num_hidden_layers = {num_layers}")
    plain, hybrid = {"m", "mamba", "mamba2", "linear_attention"}, {"g", "hybrid"}
    unknown = sorted({repr(kind) for kind in pattern if kind not in plain | hybrid})
    if unknown:
        raise ValueError(f"layers_block_type holds {', '.join(unknown)}, expected {sorted(plain | hybrid)}")
    return tuple(layer for layer, kind in enumerate(pattern) if kind in hybrid)


def json_float(value: float) -> Any:
    """A number as transformers 5 writes it into JSON, which has no infinity."""
    return {"__float__": "Infinity"} if value == math.inf else float(value)


def json_tokens(value: int | tuple[int, ...] | None) -> Any:
    """One special token or several, for JSON."""
    return list(value) if isinstance(value, tuple) else value


def check_rest(
    hf: dict[str, Any], *, fixed: Mapping[str, tuple[Any, ...]], ignored: Collection[str], stacklevel: int = 4
) -> None:
    """Checks what a reader has not taken. A key that is unknown and describes no model is left out, with a warning.

    Args:
        hf: what is left of the content.
        fixed: beside `FIXED`, keys that would change the numbers, and the values that leave them as they are.
        ignored: beside `IGNORED`, keys with no bearing on the numbers, or that are checked elsewhere.
        stacklevel: of the warning; by default it is that of who calls `registry.read_config`.

    Raises:
        ValueError: a key has a value that the model cannot honour, or is unknown and could change what it computes.
    """
    for key, allowed in {**FIXED, **fixed}.items():
        if key in hf and hf[key] not in allowed:
            raise ValueError(
                f"config key {key!r} has a value this model does not support, {hf[key]!r}, expected {allowed[0]!r}"
            )
        hf.pop(key, None)
    unknown = sorted(key for key in hf if key not in IGNORED and key not in ignored and hf[key] is not None)
    unsafe = [key for key in unknown if _could_change_numbers(key)]
    if unsafe:
        listed = ", ".join(f"{key}={hf[key]!r:.60}" for key in unsafe)
        raise ValueError(
            f"config keys {unsafe} are unknown and could change what the model computes: found {listed}, expected none"
        )
    if unknown:
        warnings.warn(
            f"config keys {unknown} are unknown and left out: they do not describe the model", stacklevel=stacklevel
        )


def check_derived(hf: Mapping[str, Any], derived: Mapping[str, Callable[[Any], Any]], config: ModelConfig) -> None:
    """Whether a file agrees with itself, in values that others already fix.

    Raises:
        ValueError: it does not.
    """
    for key, derive in derived.items():
        if hf.get(key) is not None and hf[key] != derive(config):
            raise ValueError(f"config key {key!r} is {hf[key]!r}, but the other keys make it {derive(config)!r}")


def _could_change_numbers(key: str) -> bool:
    return key not in _NOTES and not _MODEL_WORDS.isdisjoint(key.lower().strip("_").split("_"))
