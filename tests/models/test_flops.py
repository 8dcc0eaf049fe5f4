import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.helpers import abstract_model
from zamba2_jax import count_flops, preset
from zamba2_jax.models.flops import executed_flops, forward_flops, train_flops

CONFIG = dataclasses.replace(
    preset("zamba2-tiny"),
    hidden_size=192,
    num_layers=2,
    hybrid_layer_ids=(1,),
    num_shared_blocks=1,
    mamba_heads=6,
    d_state=40,
    ngroups=1,
    attention_heads=4,
    kv_heads=2,
    ffn_size=320,
    vocab_size=512,
    adapter_rank=24,
)


@pytest.mark.parametrize("changes", [{}, {"ngroups": 2, "attention_adapters": False, "num_layers": 3, "kv_heads": 4}])
def test_the_count_is_that_of_the_compiler(unchecked, changes):
    # Rows of 32 tokens are one chunk of the scan and one block of attention: there are no loops, whose bodies the
    # compiler would count once. What is not counted, elementwise, and the states, which it leaves out, are a few %.
    config, b, t = dataclasses.replace(CONFIG, **changes), 3, 32
    tokens = jax.ShapeDtypeStruct((b, t), jnp.int32)
    compiled = jax.jit(lambda model, tokens: model(tokens)).lower(abstract_model(config), tokens).compile()
    assert "while(" not in compiled.as_text()
    assert compiled.cost_analysis()["flops"] / (b * t) == pytest.approx(forward_flops(config, t).total, rel=0.03)


def test_a_step_is_three_passes_and_what_is_recomputed():
    forward = forward_flops(CONFIG, 50)
    once = train_flops(CONFIG, 50)
    assert once == 3 * forward.total == 3 * sum(count_flops(CONFIG, 50).values())
    again = {remat: executed_flops(CONFIG, 50, remat) - once for remat in ("none", "matmuls", "layer")}
    assert again == {"none": 0, "matmuls": forward.mixing, "layer": forward.mixing + forward.weights}


def test_attention_grows_with_the_row_and_the_scan_does_not():
    per_token = [forward_flops(CONFIG, length).total for length in (1024, 2048, 4096)]
    # Scores and values: two products of width 2d for each of the tokens added, in one call.
    assert per_token[1] - per_token[0] == 2 * 2 * (2 * 192) * 1024
    assert per_token[2] - per_token[1] == 2 * 2 * (2 * 192) * 2048


def test_the_7b_model_takes_two_flops_per_parameter_and_use():
    config = preset("zamba2-7b")
    # 7.36 B parameters; the two shared blocks run 13 times, so that more are used than there are.
    assert 2 * 7.36e9 < forward_flops(config, 4096).total < 2.5 * 2 * 7.36e9
