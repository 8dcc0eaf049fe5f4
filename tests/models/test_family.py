"""A model family from outside the package does all that the package's own do, without a line changed in the package."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from tests.helpers import assert_close, forward, pad_rows, random_tokens
from tests.models.gated_linear_attention import FAMILY
from tests.train import runs
from zamba2_jax import (
    cache_bytes,
    capture,
    count_flops,
    count_parameters,
    decode_step,
    generate,
    init_model,
    load_hf,
    match,
    next_token_loss,
    prefill,
    preset,
    register,
    save_hf,
    score,
    tap_names,
)
from zamba2_jax.cli.main import main
from zamba2_jax.data.batches import Batch
from zamba2_jax.evaluate import necessity
from zamba2_jax.models import registry
from zamba2_jax.nn.cache import NO_LIMIT
from zamba2_jax.parallel.mesh import make_mesh, shard_model
from zamba2_jax.train.export import export
from zamba2_jax.train.run import run


@pytest.fixture(scope="module")
def config():
    before = dict(registry._registered)
    register(FAMILY)
    yield preset("test-gla-tiny")
    registry._registered.clear()
    registry._registered.update(before)


@pytest.fixture(scope="module")
def model(config):
    return init_model(config, rngs=nnx.Rngs(3))


def test_its_name_is_taken_once(config):
    with pytest.raises(ValueError, match="family 'test-gla' is there already"):
        register(FAMILY)


def test_it_writes_as_it_reads(config, model):
    row = random_tokens(config, 10).tolist()
    (continued,) = generate(model, [row], 6)
    logits = forward(model, jnp.array([row + continued]))
    assert continued == logits[0, 9:-1].argmax(-1).tolist()

    full = forward(model, jnp.array([row]))
    _, cache = prefill(model, jnp.array([row[:4]]), capacity=16)
    assert cache.capacity == NO_LIMIT
    for i in range(4, 10):
        logits, cache = decode_step(model, jnp.array([row[i]]), cache)
        assert_close(logits[0], full[0, i], 1e-5)
    log_p = jax.nn.log_softmax(full[0, :-1])[jnp.arange(9), jnp.array(row[1:])]
    assert_close(score(model, [row])[0], log_p, 1e-5)
    assert cache_bytes(config, 2, 100).per_token == 0


def test_documents_stay_apart(config, model):
    a, b = np.split(np.asarray(random_tokens(config, 9)), [5])
    tokens, ids = pad_rows([a, b], 12, lead=[2, 0])
    tokens, ids = tokens.at[0, 7:11].set(b), ids.at[0, 7:11].set(2)
    logits = forward(model, tokens, ids)
    assert_close(logits[0, 2:7], forward(model, a[None])[0], 1e-5)
    assert_close(logits[0, 7:11], forward(model, b[None])[0], 1e-5)


def test_it_is_saved_and_loaded(config, model, tmp_path):
    save_hf(model, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "test-gla"
    again = load_hf(tmp_path / "model")
    assert again.config == config
    assert_close(again, model, 0)


def test_it_is_divided_over_a_mesh(config, model):
    tokens = random_tokens(config, 4, 8)
    expected = jax.jit(jax.value_and_grad(lambda model: next_token_loss(model, tokens)[0]))(model)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(lambda model: next_token_loss(model, tokens)[0]))(shard_model(model, mesh))
    assert_close(found, expected, 1e-5)


def test_its_taps_are_seen_and_edited(config, model):
    assert "layers.2.gla.output" in tap_names(model)
    tokens = random_tokens(config, 1, 6)
    edits = {"layers.1.gla.output": jnp.zeros_like}
    silenced = jax.jit(partial(capture, select=("layers.*.gla.output",), edits=edits))(model, tokens)
    assert not silenced.values["layers.1.gla.output"].any()
    assert np.abs(silenced.logits - forward(model, tokens)).max() > 1e-4


def test_what_its_mixers_are_worth_is_measured(config, model):
    batch = Batch(tokens=np.asarray(random_tokens(config, 2, 9)), segment_ids=np.ones((2, 9), int))
    found = necessity(model, [batch], select=("all.mixer", "layers.1.layer"))
    without = jax.jit(partial(capture, select=(), edits={"layers.1.gla.output": jnp.zeros_like}))(model, batch.tokens)
    log_p = jax.nn.log_softmax(without.logits[:, :-1])
    loss = -jnp.take_along_axis(log_p, jnp.asarray(batch.tokens)[:, 1:, None], axis=-1).mean()
    assert found["layers.1.layer"].loss == pytest.approx(float(loss), rel=1e-5)
    assert found["all.mixer"].increase != 0


def test_it_is_counted_and_matched(config, model):
    parameters = count_parameters(config)
    assert sum(parameters.values()) == sum(leaf.size for leaf in jax.tree.leaves(model))
    assert set(count_flops(config, 16)) == {"mixers", "head"}
    twice = match(config, parameters=2 * sum(parameters.values()), vary=("num_layers",))
    assert twice.num_layers == 6


@pytest.mark.parametrize("step", [{}, {"scan_layers": True, "remat": "layer", "microbatches": 2}])
def test_it_trains_and_what_it_has_learnt_is_exported(config, tmp_path, step):
    changes = {
        "model": {"preset": "test-gla-tiny", "vocab_size": 320, "num_layers": 2},
        "phases": [{"name": "all", "steps": 12, "shares": {"a": 1.0}}],
        "logging": {"every": 1, "tensorboard": False, "health_every": 4},
        "step": step,
    }
    assert run(runs.config(tmp_path, **changes), Console(quiet=True))
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.1
    export(tmp_path / "run", tmp_path / "model")
    assert load_hf(tmp_path / "model").config.num_layers == 2


@pytest.mark.parametrize("task", ["train", "decode"])
def test_it_is_planned(config, capsys, task):
    words = ["plan", "--preset", "test-gla-tiny", "--topology", "cpu:2", "--batch", "2", "--seq", "8", "--task", task]
    assert main(words) == 0
    assert "tokens/s" in capsys.readouterr().out
