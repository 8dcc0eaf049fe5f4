"""The architecture values, and reading them from every generation of config.json."""

import dataclasses
import json
import math
import re

import jax
import pytest

from tests.helpers import TINY, abstract_model
from zamba2_jax import Zamba2Config, preset, read_config
from zamba2_jax.models.registry import config_json
from zamba2_jax.models.zamba2.presets import PRESETS
from zamba2_jax.nn.config import HybridPlan

HYBRID_7B = (6, 11, 17, 23, 29, 35, 41, 47, 53, 59, 65, 71, 77)
HYBRID_1_2B = (5, 11, 17, 23, 29, 35)
HYBRID_2_7B = (6, 12, 18, 24, 30, 36, 42, 47, 51)

# hidden size, layers, shared blocks, state size, groups, Mamba heads, attention head dim, FFN; q/k/v adapters, RoPE
PUBLISHED = {
    "zamba2-1.2b": (HYBRID_1_2B, (2048, 38, 1, 128, 1, 64, 128, 8192), (True, True)),
    "zamba2-2.7b": (HYBRID_2_7B, (2560, 54, 2, 64, 1, 80, 160, 10240), (False, False)),
    "zamba2-7b": (HYBRID_7B, (3584, 81, 2, 64, 2, 112, 224, 14336), (False, True)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_values(name):
    c = preset(name)
    blocks = (c.num_shared_blocks, c.d_state, c.ngroups, c.mamba_heads)
    sizes = (c.hidden_size, c.num_layers, *blocks, c.attention_head_dim, c.ffn_size)
    assert (c.hybrid_layer_ids, sizes, (c.attention_adapters, c.use_rope)) == PUBLISHED[name]
    assert (c.mamba_head_dim, c.attention_heads, c.kv_heads, c.adapter_rank) == (64, 32, 32, 128)
    assert (c.vocab_size, c.rms_norm_eps, c.d_conv, c.expand, c.rope_theta) == (32000, 1e-5, 4, 2, 10000)
    assert (c.max_position_embeddings, c.tie_embeddings, c.add_bias_linear) == (4096, True, False)
    assert (c.pad_token_id, c.bos_token_id, c.eos_token_id) == (0, 1, 2)
    assert c.time_step_limit == (0, math.inf)


@pytest.mark.parametrize(
    ("name", "billions"), [("zamba2-1.2b", 1.2151), ("zamba2-2.7b", 2.6622), ("zamba2-7b", 7.3567)]
)
def test_parameter_counts(name, billions):
    leaves = jax.tree.leaves(abstract_model(preset(name)))
    assert round(sum(leaf.size for leaf in leaves) / 1e9, 4) == billions


def test_layer_plan():
    hybrid = {1: HybridPlan(0, 0), 3: HybridPlan(1, 1), 4: HybridPlan(2, 0)}
    assert TINY.layer_plan == tuple((layer, hybrid.get(layer)) for layer in range(7))
    seven = {row.layer: row.hybrid for row in preset("zamba2-7b").layer_plan if row.hybrid}
    assert tuple(seven) == HYBRID_7B
    assert [plan.call for plan in seven.values()] == list(range(13))
    assert "".join("AB"[plan.block] for plan in seven.values()) == "ABABABABABABA"
    one = preset("zamba2-1.2b").layer_plan
    assert {row.hybrid.block for row in one if row.hybrid} == {0}


def test_derived_sizes():
    sizes = (TINY.inner_size, TINY.mamba_head_dim, TINY.bc_size, TINY.attention_size, TINY.attention_head_dim)
    assert sizes == (48, 8, 40, 48, 12)
    assert TINY.attention_scale == pytest.approx(6**-0.5)
    assert TINY.num_calls == 3


def test_a_config_is_a_value():
    assert hash(dataclasses.replace(TINY)) == hash(TINY)
    from_lists = dataclasses.replace(TINY, hybrid_layer_ids=[1, 3, 4], time_step_limit=[0, math.inf])
    assert from_lists == TINY
    assert hash(from_lists) == hash(TINY)
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.hidden_size = 3


# One model, Zamba2-1.2B, as the files of each generation describe it.
ONE_TWO_B = preset("zamba2-1.2b")
COMMON = {
    "add_bias_linear": False,
    "architectures": ["Zamba2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "mamba_headdim": 64,
    "mamba_ngroups": 1,
    "max_position_embeddings": 4096,
    "model_type": "zamba2",
    "num_attention_heads": 32,
    "num_hidden_layers": 38,
    "num_key_value_heads": 32,
    "num_logits_to_keep": 1,
    "num_mem_blocks": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "use_cache": True,
    "use_mem_rope": True,
    "vocab_size": 32000,
}


def pattern(plain, hybrid):
    return [hybrid if layer in HYBRID_1_2B else plain for layer in range(38)]


GENERATION_1 = COMMON | {
    "conv_dimension": 4,
    "expansion_factor": 2,
    "ffn_hidden_size": 8192,
    "ft_lora": False,
    "gated_linear_unit": True,
    "kv_channels": 64,
    "layers_block_type": pattern("m", "g"),
    "lora_rank": 128,
    "num_query_groups": 32,
    "rope_theta": 10000,
    "sliding_window": None,
    "state_size": 128,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_mamba_kernels": True,
    "use_shared_attention_lora": True,
    "use_shared_block_lora": True,
}
GENERATION_2 = COMMON | {
    "adapter_rank": 128,
    "attention_head_dim": 128,
    "attention_hidden_size": 4096,
    "chunk_size": 256,
    "ffn_hidden_size": 8192,
    "hidden_act": "gelu",
    "hybrid_layer_ids": list(HYBRID_1_2B),
    "intermediate_size": 8192,
    "kv_channels": 64,
    "layers_block_type": pattern("mamba", "hybrid"),
    "mamba_d_conv": 4,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "n_mamba_heads": 64,
    "num_query_groups": 32,
    "rope_theta": 10000,
    "time_step_floor": 0.0001,
    "time_step_limit": None,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "torch_dtype": "bfloat16",
    "use_conv_bias": True,
    "use_long_context": False,
    "use_mem_eff_path": False,
    "use_shared_attention_adapter": True,
}
GENERATION_3 = {key: value for key, value in GENERATION_2.items() if key not in ("rope_theta", "hybrid_layer_ids")} | {
    "dtype": "bfloat16",
    "layers_block_type": pattern("linear_attention", "hybrid"),
    "rope_parameters": {"rope_theta": 10000, "rope_type": "default"},
    "tie_word_embeddings": True,
}


def renamed(config, old, new):
    return {new if key == old else key: value for key, value in config.items()}


SPELLINGS = {
    "1": GENERATION_1,
    "1b": GENERATION_1 | {"layers_block_type": pattern("mamba", "hybrid")},
    "2": GENERATION_2,
    "3": GENERATION_3,
    "lora_rank_mamba": GENERATION_1 | {"lora_rank_mamba": 64},
    "typo": renamed(GENERATION_1, "use_shared_attention_lora", "se_shared_attention_lora"),
    "both namings": GENERATION_1 | GENERATION_2,
    "null limit": GENERATION_1 | {"time_step_limit": None},
    "infinite limit": GENERATION_2 | {"time_step_limit": [0.0, math.inf]},
    "named infinity": GENERATION_2 | {"time_step_limit": [0.0, "Infinity"]},
    "ids only": {key: value for key, value in GENERATION_2.items() if key != "layers_block_type"},
    "layer_types": renamed(GENERATION_3, "layers_block_type", "layer_types"),
    "older rope": GENERATION_2 | {"rope_parameters": {"type": "default", "rope_theta": 10000.0}},
    "eos list": GENERATION_3 | {"eos_token_id": [2]},
    "eos list with ids past the embedding": GENERATION_3 | {"eos_token_id": [2, 32002]},
    "null for what is not known": GENERATION_3 | {"flash_mode": None},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_model_is_read_alike(spelling):
    assert read_config(SPELLINGS[spelling]) == ONE_TWO_B


def test_source_is_a_mapping_a_file_or_its_directory(tmp_path):
    before = json.dumps(GENERATION_2)
    assert read_config(GENERATION_2) == ONE_TWO_B
    assert json.dumps(GENERATION_2) == before  # reading leaves the mapping as it was
    path = tmp_path / "config.json"
    # JSON as Python writes it, with the bare Infinity of published files.
    path.write_text(json.dumps(GENERATION_2 | {"time_step_limit": [0.0, math.inf]}), encoding="utf-8")
    assert read_config(path) == read_config(str(tmp_path)) == ONE_TWO_B


def test_special_tokens_past_the_vocabulary_are_none():
    config = read_config(GENERATION_1 | {"bos_token_id": 32001, "eos_token_id": 32002})
    assert config == dataclasses.replace(ONE_TWO_B, bos_token_id=None, eos_token_id=None)
    for pad in (-1, 32000):
        assert read_config(GENERATION_1 | {"pad_token_id": pad}).pad_token_id is None


def test_several_tokens_may_end_a_text():
    config = read_config(GENERATION_1 | {"eos_token_id": [2, 7, 32001]})
    assert config.eos_token_id == (2, 7)
    assert config_json(config)["eos_token_id"] == [2, 7]
    assert read_config(config_json(config)) == config
    assert hash(dataclasses.replace(TINY, eos_token_id=[2, 7])) == hash(dataclasses.replace(TINY, eos_token_id=(2, 7)))
    with pytest.raises(
        ValueError, match=re.escape("eos_token_id=(2, 97): expected None or an id in [0, vocab_size=97)")
    ):
        dataclasses.replace(TINY, eos_token_id=(2, 97))


NOTES = {
    "unsloth_version": "2025.1",
    "unsloth_fixed": True,
    "pretraining_tp": 1,
    "model_max_length": 4096,
    "trained_by": "us",
    "metadata": {"run": 7},
}


def test_notes_in_a_config_are_left_out_with_a_warning():
    """Keys that could change numbers are errors, among them those of `REFUSED`."""
    with pytest.warns(UserWarning, match="'trained_by'.* are unknown and left out"):
        assert read_config(GENERATION_1 | NOTES) == read_config(GENERATION_1)
    for key in ("attn_softcap", "residual_multiplier", "num_experts", "qk_norm", "mlp_bias", "hidden_act_2"):
        with pytest.raises(ValueError, match=f"'{key}'.* could change what the model computes"):
            read_config(GENERATION_1 | NOTES | {key: 1})


def test_a_config_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "config.json").write_text("\ufeff" + json.dumps(GENERATION_1), encoding="utf-8")
    assert read_config(tmp_path) == read_config(GENERATION_1)


@pytest.mark.parametrize("times", [0, 1, 2])
@pytest.mark.parametrize("name", ["zamba2-1.2b", "zamba2-7b"])
def test_the_long_context_base_is_scaled_once(name, times):
    plain = preset(name)
    scale = 8 ** (plain.attention_head_dim / (plain.attention_head_dim - 2))
    long = plain.with_long_context()
    assert (long.rope_theta, long.max_position_embeddings) == (pytest.approx(10000 * scale), 16384)
    theta = 10000 * scale**times
    hf = {key: value for key, value in config_json(plain).items() if key != "rope_parameters"}
    read = read_config(hf | {"use_long_context": True, "rope_theta": theta})
    assert read == dataclasses.replace(long, rope_theta=read.rope_theta)
    assert read.rope_theta == pytest.approx(long.rope_theta)


VARIANTS = {
    **PRESETS,
    "long": preset("zamba2-7b").with_long_context(),
    "clamped": dataclasses.replace(TINY, time_step_limit=(0.01, 0.5)),
    "half clamped": dataclasses.replace(TINY, time_step_limit=(0.01, math.inf)),
    "other": dataclasses.replace(
        TINY,
        attention_adapters=False,
        kv_heads=2,
        use_rope=False,
        add_bias_linear=True,
        tie_embeddings=False,
        expand=3,
        d_conv=3,
        rms_norm_eps=1e-6,
        initializer_range=0.01,
        time_step_min=0.01,
        time_step_max=0.2,
        time_step_floor=0.001,
        rope_theta=500.0,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_export_then_import_is_the_identity(name):
    written = json.dumps(config_json(VARIANTS[name]), allow_nan=False)  # NaN and Infinity are not JSON
    assert read_config(json.loads(written)) == VARIANTS[name]


def test_every_field_differs_somewhere_in_the_variants():
    """Else the identity above could lose a field unseen."""
    for field in dataclasses.fields(Zamba2Config):
        assert len({getattr(config, field.name) for config in VARIANTS.values()}) > 1, field.name


def test_export_refuses_what_transformers_cannot_hold():
    with pytest.raises(ValueError, match=r"kv_heads=2 with attention_adapters=True"):
        config_json(dataclasses.replace(TINY, kv_heads=2))


BROKEN_RULES = [
    ({"hidden_size": 0}, "hidden_size=0: expected an integer >= 1"),
    ({"num_layers": 7.0}, "num_layers=7.0: expected an integer >= 1"),
    ({"d_state": True}, "d_state=True: expected an integer >= 1"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0: expected a finite number > 0"),
    ({"rope_theta": math.nan}, "rope_theta=nan: expected a finite number > 0"),
    ({"initializer_range": "0.02"}, "initializer_range='0.02': expected a finite number > 0"),
    ({"use_rope": 1}, "use_rope=1: expected true or false"),
    ({"eos_token_id": 97}, "eos_token_id=97: expected None or an id in [0, vocab_size=97)"),
    ({"hybrid_layer_ids": (1, 7)}, "hybrid_layer_ids=(1, 7): expected layer ids in [0, num_layers=7)"),
    ({"hybrid_layer_ids": (3, 1)}, "hybrid_layer_ids=(3, 1): expected strictly ascending"),
    ({"hybrid_layer_ids": (1, 1, 3)}, "hybrid_layer_ids=(1, 1, 3): expected strictly ascending"),
    ({"hybrid_layer_ids": 3}, "hybrid_layer_ids=3: expected a tuple"),
    ({"num_shared_blocks": 4}, "num_shared_blocks=4: expected at most the number of hybrid layers, 3"),
    ({"mamba_heads": 5}, "mamba_heads=5: expected a divisor of expand * hidden_size = 48"),
    ({"ngroups": 4}, "ngroups=4: expected a divisor of mamba_heads = 6"),
    ({"attention_heads": 5}, "attention_heads=5: expected a divisor of 2 * hidden_size = 48"),
    ({"kv_heads": 3}, "kv_heads=3: expected a divisor of attention_heads = 4"),
    ({"attention_heads": 16, "kv_heads": 16}, "attention_heads=16: expected 2 * hidden_size / attention_heads = 3"),
    ({"time_step_limit": (0.5, 0.5)}, "time_step_limit=(0.5, 0.5): expected two numbers, 0 <= low < high"),
    ({"time_step_limit": (-1.0, 1.0)}, "time_step_limit=(-1.0, 1.0): expected two numbers, 0 <= low < high"),
    ({"time_step_limit": (0.0, math.nan)}, "time_step_limit=(0.0, nan): expected two numbers, 0 <= low < high"),
    ({"time_step_limit": (0.0,)}, "time_step_limit=(0.0,): expected two numbers"),
    ({"time_step_limit": ("0", "1")}, "time_step_limit=('0', '1'): expected two numbers"),
    ({"time_step_min": 0.2}, "time_step_min=0.2: expected at most time_step_max = 0.1"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN_RULES, ids=[message for _, message in BROKEN_RULES])
def test_broken_rules_name_field_value_and_rule(changes, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        dataclasses.replace(TINY, **changes)


REFUSED = [
    ({"flash_mode": 3}, "['flash_mode'] are unknown"),
    ({"state_size": 64}, "{'mamba_d_state': 128, 'state_size': 64} name one value and disagree"),
    ({"hybrid_layer_ids": [5, 11]}, "hybrid_layer_ids=[5, 11] disagrees with layers_block_type"),
    ({"layers_block_type": ["mamba"] * 37}, "layers_block_type has 37 entries, expected num_hidden_layers = 38"),
    ({"layers_block_type": ["mamba"] * 37 + ["moe"]}, "layers_block_type holds 'moe'"),
    ({"mamba_headdim": 32}, "'mamba_headdim' is 32, but the other keys make it 64"),
    ({"attention_head_dim": 64}, "'attention_head_dim' is 64, but the other keys make it 128"),
    ({"kv_channels": 128}, "'kv_channels' is 128, but the other keys make it 64"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "expected rope_type 'default'"),
    ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta=10000 and rope_parameters.rope_theta=5.0 disagree"),
    ({"model_type": "gpt"}, "model_type 'gpt' is unknown, expected one of zamba2"),
    ({"hidden_act": "silu"}, "'hidden_act' has a value"),
    ({"gated_linear_unit": False}, "'gated_linear_unit' has a value"),
    ({"attention_dropout": 0.1}, "'attention_dropout' has a value"),
    ({"ft_lora": True}, "'ft_lora' has a value"),
    ({"sliding_window": 512}, "'sliding_window' has a value"),
    ({"quantization_config": {"bits": 4}}, "'quantization_config' has a value"),
    ({"time_step_limit": [0.0]}, "time_step_limit=[0.0]: expected null or two numbers"),
    ({"time_step_limit": [0.0, "many"]}, "time_step_limit=[0.0, 'many']: expected null or two numbers"),
    ({"num_attention_heads": 33}, "attention_heads=33: expected a divisor of 2 * hidden_size = 4096"),
    ({"num_attention_heads": 0, "use_long_context": True}, "attention_heads=0: expected an integer >= 1"),
    ({"hidden_size": "2048"}, "hidden_size='2048': expected an integer >= 1"),
    ({"layers_block_type": 3}, "layers_block_type=3: expected a list"),
    ({"layers_block_type": None, "hybrid_layer_ids": 3}, "hybrid_layer_ids=3: expected a tuple"),
    ({"rope_theta": "long"}, "rope_theta='long': expected a finite number > 0"),
    ({"rope_theta": 0}, "rope_theta=0: expected a finite number > 0"),
    ({"mamba_expand": "two", "n_mamba_heads": None}, "expand='two': expected an integer >= 1"),
    ({"n_mamba_heads": None, "mamba_headdim": None}, "config has no 'n_mamba_heads' and mamba_headdim=None"),
    ({"n_mamba_heads": None, "mamba_headdim": 60}, "mamba_headdim=60: expected a divisor"),
    ({"layers_block_type": None, "hybrid_layer_ids": None}, "config has neither 'layers_block_type' nor"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_config_that_cannot_be_honoured_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_config(GENERATION_2 | changes)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_missing_keys_are_named(key):
    with pytest.raises(ValueError, match=f"config has no '{key}'"):
        read_config({name: value for name, value in GENERATION_2.items() if name != key})


def test_files_that_hold_no_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json at .*config\.json"):
        read_config(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_config(path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="holds list, expected a JSON object"):
        read_config(path)


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"preset 'zamba3' is unknown, expected one of zamba2-1\.2b"):
        preset("zamba3")
