"""The architecture values of Mamba2, and reading them from config.json."""

import dataclasses
import json
import math
import re

import jax
import pytest

from tests.helpers import abstract_model
from zamba2_jax import Mamba2LMConfig, preset, read_config
from zamba2_jax.models.mamba2.presets import PRESETS
from zamba2_jax.models.registry import config_json

# hidden size, layers, heads, millions of parameters
PUBLISHED = {
    "mamba2-130m": (768, 24, 24, 129.0),
    "mamba2-370m": (1024, 48, 32, 368.3),
    "mamba2-780m": (1536, 48, 48, 780.2),
    "mamba2-1.3b": (2048, 48, 64, 1343.8),
    "mamba2-2.7b": (2560, 64, 80, 2702.6),
}

# As transformers 4 wrote the smallest of state-spaces' models when it was converted.
CONVERTED = {
    "architectures": ["Mamba2ForCausalLM"],
    "bos_token_id": 0,
    "chunk_size": 256,
    "conv_kernel": 4,
    "eos_token_id": 0,
    "expand": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 768,
    "initializer_range": 0.1,
    "layer_norm_epsilon": 1e-05,
    "model_type": "mamba2",
    "n_groups": 1,
    "norm_before_gate": False,
    "num_heads": 24,
    "num_hidden_layers": 24,
    "pad_token_id": 0,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "rms_norm": True,
    "state_size": 128,
    "tie_word_embeddings": True,
    "time_step_floor": 0.0001,
    "time_step_limit": [0.0, math.inf],
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 48,
    "torch_dtype": "float32",
    "transformers_version": "4.44.2",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "vocab_size": 50288,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_values(name):
    c = preset(name)
    leaves = jax.tree.leaves(abstract_model(c))
    millions = round(sum(leaf.size for leaf in leaves) / 1e6, 1)
    assert (c.hidden_size, c.num_layers, c.mamba_heads, millions) == PUBLISHED[name]
    assert (c.mamba_head_dim, c.d_state, c.ngroups, c.d_conv, c.expand) == (64, 128, 1, 4, 2)
    assert (c.vocab_size, c.tie_embeddings, c.rms_norm_eps, c.gated_norm_eps) == (50288, True, 1e-5, 1e-5)


SPELLINGS = {
    "as converted": CONVERTED,
    "as trained by transformers": CONVERTED | {"norm_before_gate": True, "intermediate_size": 1536},
    "as transformers 5 writes it": CONVERTED
    | {"time_step_limit": [0.0, {"__float__": "Infinity"}], "dtype": "float32"},
    "with its layers": CONVERTED | {"layer_types": ["linear_attention"] * 24, "hidden_act": "swish"},
    "null for what is not known": CONVERTED | {"sliding_window": None, "time_step_limit": None},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_model_is_read_alike(spelling):
    assert read_config(SPELLINGS[spelling]) == preset("mamba2-130m", initializer_range=0.1)


def test_what_a_file_leaves_out_is_what_transformers_takes():
    transformers = pytest.importorskip("transformers", reason="needs transformers, of the parity extra")
    sizes = {"model_type": "mamba2", "hidden_size": 4096, "num_hidden_layers": 64, "num_heads": 128}
    whole = json.loads(transformers.Mamba2Config(**sizes).to_json_string(use_diff=False))
    assert read_config(sizes) == read_config(whole)


VARIANTS = {
    **PRESETS,
    "half clamped": preset("mamba2-tiny", time_step_limit=(0.01, math.inf), eos_token_id=(2, 5)),
    "other": preset(
        "mamba2-tiny",
        expand=3,
        d_conv=3,
        rms_norm_eps=1e-6,
        tie_embeddings=False,
        add_bias_linear=True,
        use_conv_bias=False,
        residual_in_fp32=False,
        time_step_min=0.01,
        time_step_max=0.2,
        time_step_floor=0.001,
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
    for field in dataclasses.fields(Mamba2LMConfig):
        assert len({getattr(config, field.name) for config in VARIANTS.values()}) > 1, field.name


REFUSED = [
    ({"hidden_act": "gelu"}, "'hidden_act' has a value this model does not support, 'gelu', expected 'silu'"),
    ({"rms_norm": False}, "'rms_norm' has a value this model does not support, False, expected True"),
    ({"quantization_config": {"bits": 4}}, "'quantization_config' has a value"),
    ({"head_dim": 32}, "'head_dim' is 32, but the other keys make it 64"),
    ({"intermediate_size": 3072}, "'intermediate_size' is 3072, but the other keys make it 1536"),
    ({"layer_types": ["attention"] * 24}, "'layer_types' is ['attention', "),
    ({"num_heads": 25}, "mamba_heads=25: expected a divisor of expand * hidden_size = 1536"),
    ({"n_groups": 5}, "ngroups=5: expected a divisor of mamba_heads = 24"),
    ({"expand": "two"}, "expand='two': expected an integer >= 1"),
    ({"use_conv_bias": 1}, "use_conv_bias=1: expected true or false"),
    ({"residual_in_fp32": "yes"}, "residual_in_fp32='yes': expected true or false"),
    ({"time_step_limit": [0.0, {"__float__": "many"}]}, "time_step_limit=[0.0, {'__float__': 'many'}]: expected null"),
    ({"time_step_limit": [0.0, {"a": 1}]}, "time_step_limit=[0.0, {'a': 1}]: expected null or two numbers"),
    ({"attn_layer_idx": [3]}, "['attn_layer_idx'] are unknown and could change what the model computes: found attn_"),
    ({"num_heads": None}, "config has no 'num_heads', expected an integer"),
    ({"hidden_size": None}, "config has no 'hidden_size', expected an integer"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_config_that_cannot_be_honoured_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_config(CONVERTED | changes)
