"""Zamba2 without some of its parts is a valid architecture that does all the whole one does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import SMALL, TINY, assert_close, forward, random_model, random_tokens
from tests.models import reference
from zamba2_jax import count_parameters, decode_step, generate, load_hf, match, prefill, preset, save_hf, score
from zamba2_jax.data.batches import Batch
from zamba2_jax.evaluate import necessity
from zamba2_jax.models.flops import forward_flops
from zamba2_jax.parallel.mesh import make_mesh, shard_model
from zamba2_jax.train.optimizer import AdamW
from zamba2_jax.train.step import StepConfig, init_state, loss_and_gradient, train_step

ABLATIONS = {
    "no shared call": {"hybrid_layer_ids": (), "num_shared_blocks": 0, "attention_adapters": False},
    "no adapters": {"adapter_rank": 0, "attention_adapters": False},
    "every layer hybrid": {"hybrid_layer_ids": (0, 1, 2), "num_shared_blocks": 2},
}


@pytest.fixture(params=ABLATIONS.values(), ids=ABLATIONS, scope="module")
def config(request):
    return dataclasses.replace(SMALL, **request.param)


def test_it_is_the_definition_in_every_pass(x64, config):
    model, row = random_model(config, jnp.float64), random_tokens(config, 9)
    expected = reference.logits(model, row, np.arange(9))
    assert_close(forward(model, row[None])[0], expected, 1e-12)
    last, cache = prefill(model, row[None, :6], capacity=9)
    assert_close(last[0], expected[5], 1e-12)
    for i in range(6, 9):
        last, cache = decode_step(model, row[None, i], cache)
        assert_close(last[0], expected[i], 1e-12)


@pytest.mark.parametrize("name", ["no shared call", "no adapters"])
def test_it_trains_whatever_way_it_is_run(x64, name):
    config = dataclasses.replace(SMALL, **ABLATIONS[name])
    model = random_model(config, jnp.float64)
    batch = Batch(tokens=random_tokens(config, 4, 8), segment_ids=jnp.ones((4, 8), int))
    expected = jax.jit(loss_and_gradient)(model, batch)
    options = StepConfig(scan_layers=True, remat="layer")
    assert_close(jax.jit(lambda *given: loss_and_gradient(*given, options))(model, batch), expected, 1e-12)
    mesh = make_mesh(fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        assert_close(jax.jit(loss_and_gradient)(shard_model(model, mesh), batch), expected, 1e-12)

    optimizer = AdamW().transformation()
    state = init_state(model, optimizer)
    step = jax.jit(lambda state: train_step(state, batch, optimizer=optimizer, schedule=lambda _: 1e-3, health_every=1))
    state, metrics = step(state)
    assert metrics.loss == pytest.approx(float(expected[0]), rel=1e-12)
    assert (metrics.health.calls is None) == (config.num_calls == 0)
    assert step(state)[1].loss < expected[0]


@pytest.mark.parametrize("name", ["no shared call", "no adapters"])
def test_it_writes_is_scored_and_inspected(name):
    config = dataclasses.replace(SMALL, **ABLATIONS[name])
    model = random_model(config)
    row = random_tokens(config, 6).tolist()
    (continued,) = generate(model, [row], 4)
    assert continued == forward(model, jnp.array([row + continued]))[0, 5:-1].argmax(-1).tolist()
    assert np.isfinite(score(model, [row])[0]).all()
    found = necessity(model, [Batch(tokens=np.array([row] * 2), segment_ids=np.ones((2, 6), int))], select=("*.mixer",))
    assert len(found.silenced) >= 4


def test_it_is_saved_and_loaded_and_transformers_takes_it(config, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = random_model(config)
    save_hf(model, tmp_path / "model", time_step_min=1e-30)
    again = load_hf(tmp_path / "model")
    assert again.config == dataclasses.replace(config, time_step_min=1e-30)
    assert_close(jax.tree.leaves(again), jax.tree.leaves(model), 0)
    if not config.num_calls:
        pytest.skip("transformers has no Zamba2 without a shared block")
    theirs, info = transformers.Zamba2ForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert {kind: names for kind, names in info.items() if names} == {}
    tokens = random_tokens(config, 2, 9)
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(tokens)), use_cache=False).logits
    assert_close(forward(model, tokens), expected.numpy(), 2e-5)


def test_presets_are_overridden_and_mistakes_named():
    assert preset("zamba2-tiny", num_layers=5).num_layers == 5
    with pytest.raises(ValueError, match="depth is not a field of preset 'zamba2-tiny', expected one of hidden_size, "):
        preset("zamba2-tiny", depth=3)
    with pytest.raises(ValueError, match="hybrid_layer_ids"):
        preset("zamba2-tiny", num_layers=2)
    with pytest.raises(ValueError, match=r"num_shared_blocks=0: expected at least 1, as hybrid_layer_ids=\(1, 3, 4\)"):
        preset("zamba2-tiny", num_shared_blocks=0)
    with pytest.raises(ValueError, match="adapter_rank=0: expected at least 1 with attention_adapters"):
        preset("zamba2-tiny", adapter_rank=0)


def test_depth_keeps_the_pattern():
    config = preset("zamba2-1.2b")
    assert config.with_num_layers(20).hybrid_layer_ids == (5, 11, 17)
    assert config.with_num_layers(50).hybrid_layer_ids == (5, 11, 17, 23, 29, 35, 41, 47)
    assert config.with_num_layers(3).num_shared_blocks == 0


def test_the_nearest_architecture_is_found():
    """By trying all."""
    parts = count_parameters(TINY)
    assert set(parts) == {"embed", "layers", "shared", "calls", "norm"}
    assert sum(parts.values()) == sum(leaf.size for leaf in jax.tree.leaves(random_model(TINY)))

    def of(candidate):
        return sum(count_parameters(candidate).values())

    no_calls = dataclasses.replace(TINY, **ABLATIONS["no shared call"])
    found = match(no_calls, parameters=of(TINY), vary=("num_layers", "d_state"))
    every = [dataclasses.replace(no_calls, num_layers=layers) for layers in range(1, 20)]
    assert found.num_layers == min(every, key=lambda candidate: abs(of(candidate) - of(TINY))).num_layers
    assert abs(of(found) - of(TINY)) < 0.01 * of(TINY)

    target = forward_flops(TINY, 50).total
    found = match(no_calls, flops=target, length=50, vary=("hidden_size",))
    every = [dataclasses.replace(no_calls, hidden_size=size) for size in range(12, 97, 12)]  # what the heads divide
    expected = min(every, key=lambda candidate: abs(forward_flops(candidate, 50).total - target))
    assert found == expected
    with pytest.raises(ValueError, match="expected exactly one of them"):
        match(TINY)
    with pytest.raises(ValueError, match="vary names 'num_shared_blocks': no value from 1 "):
        match(no_calls, parameters=100, vary=("num_shared_blocks",))
    with pytest.raises(ValueError, match="vary names 'max_position_embeddings', on which the size does not depend"):
        match(TINY, parameters=100, vary=("max_position_embeddings",))
    with pytest.raises(ValueError, match="vary names 'use_rope', expected integer fields"):
        match(TINY, parameters=100, vary=("use_rope",))
