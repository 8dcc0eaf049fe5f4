import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.helpers import TINY, abstract_model
from zamba2_jax.plan.flops import executed_flops, forward_flops, model_flops

# Wide, so that products with weights are nearly all there is.
WIDE = dataclasses.replace(
    TINY, hidden_size=768, mamba_heads=6, attention_heads=4, kv_heads=2, ffn_size=1280, vocab_size=2048, adapter_rank=40
)


def test_products_with_weights_are_those_that_are_lowered():
    """XLA's count of a pass over one token, in which nothing is a loop; it counts elementwise operations too."""
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    counted = jax.jit(lambda model, token: model(token)).lower(abstract_model(WIDE), token).cost_analysis()["flops"]
    flops = forward_flops(WIDE, 1)
    assert counted == pytest.approx(flops.matrices + flops.head, rel=0.02)


def test_a_step_is_three_passes_and_what_is_recomputed():
    matrices, mixing, head = forward_flops(TINY, 50)
    # Attention to 25 tokens on average, in two products of width 48 for each of three calls; a state of 48 x 10
    # updated and read in each of seven layers.
    assert mixing == 2 * 2 * 25 * 48 * 3 + 2 * 2 * 48 * 10 * 7
    assert model_flops(TINY, 2, 50) == 100 * 3 * (matrices + mixing + head)
    again = {
        remat: executed_flops(TINY, 2, 50, remat) - model_flops(TINY, 2, 50) for remat in ("none", "matmuls", "layer")
    }
    assert again == {"none": 100 * head, "matmuls": 100 * (head + mixing), "layer": 100 * (head + mixing + matrices)}
