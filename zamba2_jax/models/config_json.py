"""What the readers of all families' config.json share: which keys describe a model, and which do not."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

# Keys with no bearing on the numbers: performance hints of other implementations, generation and bookkeeping.
_IGNORED = frozenset(
    """
    architectures auto_map dtype torch_dtype transformers_version _name_or_path _attn_implementation
    _attn_implementation_autoset _commit_hash attn_implementation name_or_path
    use_cache num_logits_to_keep output_attentions output_hidden_states output_scores return_dict
    return_dict_in_generate torchscript use_bfloat16
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


def take_fields(hf: dict[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Takes values out of the content of a config.json.

    Args:
        hf: the content; what is found is removed.
        names: the keys that a field may have there.

    Returns:
        The fields that are there and not null; those of tokens, whose names end in "_token_id", null too.

    Raises:
        ValueError: several keys of a field disagree.
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


def drop_unknown_tokens(fields: dict[str, Any], vocab_size: int) -> None:
    """Leaves out special tokens that no one can feed.

    Some published files name ids just past the embedding (32001, 32002), or -1.
    """
    for token in {"pad_token_id", "bos_token_id", "eos_token_id"} & set(fields):
        value = fields[token]
        listed = value if isinstance(value, list) and token == "eos_token_id" else [value]
        known = [id_ for id_ in listed if not isinstance(id_, int) or 0 <= id_ < vocab_size]
        fields[token] = known[0] if len(known) == 1 else tuple(known) or None


def take_fixed(hf: dict[str, Any], fixed: Mapping[str, Sequence[Any]]) -> None:
    """Takes out keys that would change the numbers, and for each of which some values leave them as they are.

    Raises:
        ValueError: one has another value.
    """
    for key, allowed in fixed.items():
        if key in hf and hf.pop(key) not in allowed:
            raise ValueError(f"config key {key!r} has a value this model does not support, expected {allowed[0]!r}")


def check_rest(hf: Mapping[str, Any], known: Collection[str] = ()) -> None:
    """What nothing has taken out, keys that are null or `known` apart: it must not describe the model.

    A key that is unknown and describes something else is left out, with a warning.

    Raises:
        ValueError: a key is unknown and could change what the model computes.
    """
    unknown = sorted(key for key in hf if key not in _IGNORED and key not in known and hf[key] is not None)
    unsafe = [key for key in unknown if _could_change_numbers(key)]
    if unsafe:
        raise ValueError(f"config keys {unsafe} are unknown and could change what the model computes")
    if unknown:
        warnings.warn(f"config keys {unknown} are unknown and left out: they do not describe the model", stacklevel=4)


def _could_change_numbers(key: str) -> bool:
    return key not in _NOTES and not _MODEL_WORDS.isdisjoint(key.lower().strip("_").split("_"))
