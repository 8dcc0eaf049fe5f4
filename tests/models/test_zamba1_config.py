"""The architecture values of Zamba1, and reading them from config.json."""

import dataclasses
import json
import re

import jax
import pytest

from tests.helpers import abstract_model
from zamba2_jax import Zamba1Config, preset, read_config
from zamba2_jax.models.registry import config_json
from zamba2_jax.models.zamba1.presets import PRESETS

SEVEN_B = preset("zamba-7b-v1")
HYBRID = (2, 7, 13, 19, 25, 31, 37, 43, 49, 55, 61, 67, 73)

# As transformers 4 writes the published model's.
WRITTEN = {
    "architectures": ["ZambaForCausalLM"],
    "attention_dropout": 0.0,
    "attention_head_dim": 464,
    "attention_hidden_size": 7424,
    "attn_layer_offset": 4,
    "attn_layer_period": 6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_mamba_act": "silu",
    "hidden_size": 3712,
    "initializer_range": 0.02,
    "intermediate_size": 14848,
    "layers_block_type": ["hybrid" if layer in HYBRID else "mamba" for layer in range(76)],
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_dt_rank": 232,
    "mamba_expand": 2,
    "mamba_proj_bias": False,
    "max_position_embeddings": 4096,
    "model_type": "zamba",
    "n_mamba_heads": 2,
    "num_attention_heads": 16,
    "num_hidden_layers": 76,
    "num_key_value_heads": 16,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
    "time_step_floor": 0.0001,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
    "use_mamba_kernels": True,
    "vocab_size": 32000,
}


def test_the_preset_has_the_published_values():
    c = SEVEN_B
    assert (c.hybrid_layer_ids, c.num_shared_blocks, c.time_step_rank, c.mamba_head_dim) == (HYBRID, 1, 232, 3712)
    assert (c.attention_head_dim, c.rotary_base, c.adapter_rank, c.vocab_size) == (464, None, 0, 32000)
    # By hand: 76 mixers with their norms, 13 maps, one block, the embedding.
    d, e, f, n, rank = 3712, 7424, 14848, 16, 232
    mixer = 2 * e * d + 5 * e + (rank + 2 * n) * e + e * rank + e + e * n + e + d * e + d
    block = 2 * d + 3 * (2 * d) ** 2 + d * 2 * d + d + 3 * d * f
    leaves = jax.tree.leaves(abstract_model(c))
    assert sum(leaf.size for leaf in leaves) == 76 * mixer + 13 * d * d + block + 32000 * d + d


SPELLINGS = {
    "as transformers 4 writes it": WRITTEN,
    "by period": {key: value for key, value in WRITTEN.items() if key != "layers_block_type"},
    "as transformers 5 writes it": WRITTEN
    | {"layers_block_type": ["hybrid" if layer in HYBRID else "linear_attention" for layer in range(76)]},
    "rank auto": WRITTEN | {"mamba_dt_rank": "auto", "use_associative_scan": True},
    "next to nothing": {"model_type": "zamba"},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_model_is_read_alike(spelling):
    assert read_config(SPELLINGS[spelling]) == SEVEN_B


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 21, "attn_layer_period": 4, "attn_layer_offset": 1}])
def test_what_a_file_leaves_out_is_what_transformers_takes(changes):
    transformers = pytest.importorskip("transformers", reason="needs transformers, of the parity extra")
    whole = json.loads(transformers.ZambaConfig(**changes).to_json_string(use_diff=False))
    assert "hybrid" in whole["layers_block_type"]
    assert read_config({"model_type": "zamba"} | changes) == read_config(whole)


VARIANTS = {
    **PRESETS,
    "other": preset(
        "zamba1-tiny",
        kv_heads=2,
        dt_rank=None,
        expand=3,
        d_conv=3,
        rms_norm_eps=1e-6,
        tie_embeddings=False,
        use_proj_bias=True,
        use_conv_bias=False,
        time_step_min=0.01,
        time_step_max=0.2,
        time_step_floor=0.001,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=(2, 5),
    ),
    "without a block": preset("zamba1-tiny", hybrid_layer_ids=(), num_shared_blocks=0),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_export_then_import_is_the_identity(name):
    written = json.dumps(config_json(VARIANTS[name]), allow_nan=False)  # NaN and Infinity are not JSON
    assert read_config(json.loads(written)) == VARIANTS[name]


def test_every_field_differs_somewhere_in_the_variants():
    """Else the identity above could lose a field unseen."""
    for field in dataclasses.fields(Zamba1Config):
        assert len({getattr(config, field.name) for config in VARIANTS.values()}) > 1, field.name


def test_a_rank_is_held_alike_however_it_is_given():
    assert preset("zamba-7b-v1", dt_rank=232) == SEVEN_B
    assert preset("zamba-7b-v1", dt_rank=231).time_step_rank == 231
    assert preset("zamba1-tiny", dt_rank=None).time_step_rank == 2


REFUSED = [
    ({"hidden_act": "silu"}, "'hidden_act' has a value this model does not support, 'silu', expected 'gelu'"),
    ({"hidden_mamba_act": "gelu"}, "'hidden_mamba_act' has a value this model does not support"),
    ({"attention_dropout": 0.1}, "'attention_dropout' has a value this model does not support"),
    ({"attention_head_dim": 232}, "'attention_head_dim' is 232, but the other keys make it 464"),
    ({"attention_hidden_size": 3712}, "'attention_hidden_size' is 3712, but the other keys make it 7424"),
    ({"n_mamba_heads": 3}, "mamba_heads=3: expected a divisor of expand * hidden_size = 7424"),
    ({"mamba_dt_rank": 0}, "dt_rank=0: expected an integer >= 1"),
    ({"mamba_expand": "two"}, "expand='two': expected an integer >= 1"),
    ({"mamba_conv_bias": 1}, "use_conv_bias=1: expected true or false"),
    ({"num_attention_heads": 15}, "attention_heads=15: expected a divisor of 2 * hidden_size = 7424"),
    ({"layers_block_type": ["hybrid"]}, "layers_block_type has 1 entries, expected num_hidden_layers = 76"),
    ({"layers_block_type": ["mamba", "moe"] * 38}, "layers_block_type holds 'moe', expected"),
    ({"layers_block_type": None, "attn_layer_period": 0}, "attn_layer_period=0: expected an integer >= 1"),
    ({"mamba_ngroups": 2}, "['mamba_ngroups'] are unknown and could change what the model computes"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_config_that_cannot_be_honoured_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_config(WRITTEN | changes)


def test_several_blocks_have_no_form_in_transformers():
    with pytest.raises(ValueError, match="num_shared_blocks=2 has no Hugging Face form"):
        config_json(preset("zamba1-tiny", num_shared_blocks=2))
