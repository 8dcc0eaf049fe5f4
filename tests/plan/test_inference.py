import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.helpers import TINY, abstract_model
from zamba2_jax import init_model, preset
from zamba2_jax.inference.decode import take_in
from zamba2_jax.models.cache import init_cache
from zamba2_jax.models.flops import prefill_flops, step_flops
from zamba2_jax.models.transformer.config import MistralConfig
from zamba2_jax.plan.chips import describe_slice
from zamba2_jax.plan.inference import InferenceJob, estimate_inference
from zamba2_jax.plan.search import inference_candidates

HYBRID = dataclasses.replace(TINY, vocab_size=96, num_layers=2, hybrid_layer_ids=(1,), num_shared_blocks=1)
WINDOW = MistralConfig(
    vocab_size=96, hidden_size=24, num_layers=2, attention_heads=6, kv_heads=2, head_dim=10, ffn_size=40,
    sliding_window=16, max_position_embeddings=128,
)  # fmt: skip
MAMBA = dataclasses.replace(preset("mamba2-tiny"), vocab_size=96, num_layers=2)


def on_first_device(tree):
    """Bytes that really lie on the first device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("task", "config"),
    [("decode", HYBRID), ("prefill", HYBRID), ("decode", MAMBA), ("prefill", WINDOW)],
    ids=["decode hybrid", "prefill hybrid", "decode mamba2", "prefill window"],
)
def test_what_is_planned_is_what_lies_on_a_device(task, config):
    job = InferenceJob(task=task, config=config, batch=6, length=40)
    slice = describe_slice("cpu:4")
    found = estimate_inference(job, slice, {"fsdp": 2, "tensor": 2})
    with jax.set_mesh(slice.mesh(fsdp=2, tensor=2)):
        assert found.weights == on_first_device(init_model(config, rngs=nnx.Rngs(0), dtype="bfloat16"))
        assert found.caches == on_first_device(jax.jit(lambda: init_cache(config, 6, 40, "bfloat16"))())
    per_row = {"decode": step_flops, "prefill": prefill_flops}[task](config, 40)
    assert found.flops == 6 * per_row / 4
    # All weights but the rows of the embedding that no token has, and what is in the caches, are read.
    embedding = 2 * 96 * config.hidden_size // 2
    assert found.traffic.memory > found.weights - embedding + (found.caches if task == "decode" else 0)
    # The heads of attention, or of the scan, are summed over `tensor` in every layer.
    assert found.traffic.collectives["all-reduce"] >= config.num_layers
    assert found.tokens_per_second == (6 * 40 if task == "prefill" else 6) / found.seconds
    # Two blocks of 20 keys for all queries, where the compiler cannot know it.
    assert found.unknown_trips == (2 if task == "prefill" else 1)
    if task == "decode":
        assert found.traffic.unknown_loops == 0


@pytest.mark.parametrize("config", [HYBRID, WINDOW, MAMBA], ids=["hybrid", "window", "mamba2"])
@pytest.mark.parametrize("task", ["prefill", "decode"])
def test_the_count_of_operations_is_that_of_the_compiler(unchecked, config, task):
    # Of a capacity twice the tokens, attention takes half in its first turn, and the compiler counts one turn.
    config, b, t = dataclasses.replace(config, **WIDER[type(config)]), 3, 16
    model, cache = abstract_model(config), jax.eval_shape(lambda: init_cache(config, b, 2 * t))
    shape = (b, t) if task == "prefill" else (b,)

    def run(model, tokens, cache):
        return take_in(model, tokens, None, cache) if task == "prefill" else model.step(tokens, cache)

    compiled = jax.jit(run).lower(model, jax.ShapeDtypeStruct(shape, jnp.int32), cache).compile()
    count = {"decode": step_flops, "prefill": prefill_flops}[task](config, t)
    # Elementwise work is not in the formula.
    assert compiled.cost_analysis()["flops"] / b == pytest.approx(count, rel=0.08)


WIDER = {
    type(HYBRID): {"hidden_size": 192, "ffn_size": 320, "d_state": 40, "adapter_rank": 24},
    type(WINDOW): {"hidden_size": 192, "ffn_size": 320, "head_dim": 20, "sliding_window": 64},
    type(MAMBA): {"hidden_size": 192, "d_state": 40},
}


def test_meshes_that_inference_cannot_use_are_refused():
    job, slice = InferenceJob(task="decode", config=HYBRID, batch=3, length=40), describe_slice("cpu:4")
    with pytest.raises(ValueError, match="mesh sequence=2: expected 1 for decode"):
        estimate_inference(job, slice, {"sequence": 2, "tensor": 2})
    with pytest.raises(ValueError, match="mesh data=2, fsdp=1 does not divide the batch, 3"):
        estimate_inference(job, slice, {"data": 2, "tensor": 2})
    with pytest.raises(ValueError, match="tensor=4 does not divide the Mamba heads, 6"):
        estimate_inference(job, slice, {"tensor": 4})
    with pytest.raises(ValueError, match="length=0: expected an integer >= 1"):
        dataclasses.replace(job, length=0)
    with pytest.raises(ValueError, match="task='train': expected one of prefill, decode"):
        dataclasses.replace(job, task="train")


def test_candidates_have_rows_for_every_copy_of_the_weights():
    job, slice = InferenceJob(task="decode", config=HYBRID, batch=4, length=40), describe_slice("cpu:4")
    meshes = [{"data": 4, "fsdp": 1, "tensor": 1}, {"data": 1, "fsdp": 4, "tensor": 1}]
    meshes += [{"data": 2, "fsdp": 1, "tensor": 2}, {"data": 1, "fsdp": 2, "tensor": 2}]
    assert list(inference_candidates(job, slice)) == meshes  # tensor=4 does not divide six heads
    one_row = list(inference_candidates(dataclasses.replace(job, batch=1), slice))
    assert one_row == [sizes for sizes in meshes if sizes["data"] == 1]
