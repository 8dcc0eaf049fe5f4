import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from tests.train.runs import ARCHITECTURE, table
from zamba2_jax import preset
from zamba2_jax.data.synthetic import Recall
from zamba2_jax.train import recipe
from zamba2_jax.train.config import RunConfig, differences, from_table, load_config, with_overrides
from zamba2_jax.train.optimizer import Muon, ParameterGroup

EXAMPLE = Path(__file__).parents[2] / "experiments" / "nano.toml"


def changed(values, path, value):
    """A copy with one value set, or removed if it is `del`."""
    values = json.loads(json.dumps(values))
    *parents, last = path.split(".")
    at = values
    for key in parents:
        at = at[int(key)] if isinstance(at, list) else at.setdefault(key, {})
    if value is del_:
        del at[last]
    else:
        at[last] = value
    return values


del_ = object()


def test_the_example_says_the_defaults_and_can_be_overridden():
    config = load_config(EXAMPLE, ["phases.2.steps=9", "phases.2.warmup_steps = 1", "directory=/x y", "mesh.tensor=2"])
    assert (config.phases[0].steps, config.phases[2].steps, config.phases[2].warmup_steps) == (240, 9, 1)
    assert (config.directory, config.mesh.tensor) == ("/x y", 2)
    assert config.model.resolve() == preset("zamba2-nano")


def test_a_preset_is_overridden_field_by_field(tmp_path):
    fields = {"num_layers": 3, "hybrid_layer_ids": (1,), "num_shared_blocks": 1}
    words = ["model.num_layers=3", "model.hybrid_layer_ids=[1]", "model.num_shared_blocks=1"]
    config = load_config(EXAMPLE, words)
    assert config.model.resolve() == preset("zamba2-nano", **fields)
    assert from_table(RunConfig, config.as_dict()).model.resolve() == config.model.resolve()
    with pytest.raises(ValueError, match="depth is not a field of preset 'zamba2-nano', expected one of hidden_size"):
        load_config(EXAMPLE, ["model.depth=3"]).model.resolve()
    with pytest.raises(ValueError, match="model: num_layers is given beside hf: expected a preset"):
        from_table(RunConfig, table(tmp_path, model={"hf": "somewhere", "num_layers": 3}))
    other = from_table(RunConfig, table(tmp_path, model={"architecture": {"model_type": "gpt", "hidden_size": 8}}))
    with pytest.raises(ValueError, match="model_type 'gpt' is unknown, expected one of zamba2, "):
        other.model.resolve()


def test_the_example_is_the_recipe_of_the_demo():
    config, phases = load_config(EXAMPLE), recipe.phases()
    assert config.optimizer == recipe.optimizer(preset("zamba2-nano"))
    assert config.init_scale == recipe.init_scale(preset("zamba2-nano"))
    assert config.learning_rate == recipe.LEARNING_RATE
    assert [dataclasses.replace(phase, shares={"": 1.0}) for phase in config.phases] == [
        dataclasses.replace(phase, shares={"": 1.0}) for phase in phases
    ]
    assert [phase.shares for phase in config.phases] == [pytest.approx(phase.shares) for phase in phases]


def test_the_recipe_trains_any_architecture_as_the_example_does():
    example = load_config(EXAMPLE)
    config = recipe.run_config(example.model.resolve())
    assert config.model.resolve() == example.model.resolve()
    same = ("tokenizer", "sources", "learning_rate", "batch_size", "length", "optimizer", "init_scale", "evaluation")
    assert {name: getattr(config, name) for name in same} == {name: getattr(example, name) for name in same}
    assert (config.logging, config.max_skipped) == (example.logging, example.max_skipped)
    bare = preset("zamba2-nano", hybrid_layer_ids=(), num_shared_blocks=0)
    config = recipe.run_config(bare, steps=(2, 3, 4), length=32)
    assert [phase.steps for phase in config.phases] == [2, 3, 4]
    assert config.sources["copying"].lengths == (3, 14)
    assert set(config.init_scale) == {"embed", "layers.*.mamba.out"}
    assert config.optimizer.groups == ()


def test_values_by_key_make_another_config(tmp_path):
    config = from_table(RunConfig, table(tmp_path))
    changed = with_overrides(config, {"phases.1.steps": 9, "model.architecture.ffn_size": 16, "optimizer.b1": 0.8})
    assert (changed.phases[1].steps, changed.model.resolve().ffn_size, changed.optimizer.b1) == (9, 16, 0.8)
    back = {"phases.1.steps": 6, "model.architecture.ffn_size": 24, "optimizer.b1": 0.9}
    assert with_overrides(changed, back) == config
    with pytest.raises(ValueError, match=r"optimizer\.b3 is unknown"):
        with_overrides(config, {"optimizer.b3": 0.8})


def test_what_is_saved_is_what_was_read(tmp_path):
    values = table(tmp_path, optimizer={"kind": "muon", "groups": [{"match": "embed", "delay_steps": 3}]})
    values["sources"]["c"] = {"kind": "recall", "pairs": [2, 3]}
    config = from_table(RunConfig, values)
    assert config.optimizer == Muon(groups=(ParameterGroup(match="embed", delay_steps=3),))
    assert config.sources["c"] == Recall(pairs=(2, 3))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.as_dict()))
    assert load_config(path) == config
    assert differences(config, load_config(path)) == []


def test_an_architecture_is_checked_and_may_be_infinite(tmp_path):
    config = from_table(
        RunConfig, table(tmp_path, model={"architecture": {**ARCHITECTURE, "time_step_limit": [0.1, math.inf]}})
    )
    assert config.model.resolve().time_step_limit == (0.1, math.inf)
    config = from_table(RunConfig, table(tmp_path, model={"architecture": {**ARCHITECTURE, "num_layer": 1}}))
    with pytest.raises(ValueError, match=r"model\.architecture\.num_layer is unknown: did you mean 'num_layers'\?"):
        config.model.resolve()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("batchsize", 3, "batchsize is unknown: did you mean 'batch_size'?"),
        ("optimizer", {"beta": 1}, "optimizer.beta is unknown: expected one of b1, b2, eps"),
        ("phases.1.step", 3, "phases.1.step is unknown: did you mean 'steps'?"),
        ("phases.1.steps", del_, "phases.1.steps missing"),
        ("learning_rate", del_, "learning_rate missing"),
        ("batch_size", 0, "batch_size=0: expected at least 1"),
        ("batch_size", 2.5, "batch_size=2.5: expected an integer"),
        ("batch_size", True, "batch_size=True: expected an integer"),
        ("learning_rate", "fast", "learning_rate='fast': expected a number"),
        ("learning_rate", -1, "peak learning rate=-1.0: expected a finite number > 0"),
        ("length", 1, "length=1: expected at least 2"),
        ("seed", -1, "seed=-1: expected an integer in [0, 2^31)"),
        ("data_seed", -1, "data_seed=-1: expected an integer in [0, 2^31)"),
        ("init_scale", {"embed": 0}, "init_scale.embed=0.0: expected a finite number > 0"),
        ("dtype", "float8", "dtype='float8': expected one of float32, bfloat16"),
        ("checkpoints.every", 0, "checkpoints.every=0: expected at least 1"),
        ("logging.profile_start", 0, "logging.profile_start=0: expected at least 1"),
        ("phases.0.shares", {"aa": 1.0}, "phase 'first': shares name 'aa': did you mean 'a'?"),
        ("phases.0.shares", {"a": 0.5}, "phase 'first': shares={'a': 0.5}: expected a sum of 1"),
        ("phases", 3, "phases=3: expected a list"),
        ("mesh", 3, "mesh is 3: expected a table"),
        (
            "meshes",
            [{"data": 2}, {"data": 0}],
            "meshes.1={'data': 0, 'fsdp': 1, 'tensor': 1, 'sequence': 1}: expected all",
        ),
        ("model", {}, "model: nothing is given: expected one of preset, architecture, hf"),
        ("model.preset", "zamba2-tiny", "model: ['preset', 'architecture'] is given: expected one of"),
        ("step.remat", "all", "step.remat='all': expected one of none, layer, matmuls"),
        ("step.microbatches", 3, "batch_size=8: expected a multiple of step.microbatches=3"),
        ("sources.a.kind", "txt", "sources.a.kind='txt': expected one of text, jsonl"),
        ("sources.a.kind", del_, "sources.a.kind missing"),
        ("sources.a", 3, "sources.a is 3: expected a table"),
        ("sources.a", {"kind": "recall", "pair": 3}, "sources.a.pair is unknown: did you mean 'pairs'?"),
        ("sources.a", {"kind": "recall", "pairs": [3]}, "sources.a.pairs=[3]: expected 2 values"),
        ("optimizer.kind", "sgd", "optimizer.kind='sgd': expected one of adamw, muon"),
        ("optimizer.momentum", 0.9, "optimizer.momentum is unknown: expected one of b1, b2, eps"),
        ("optimizer.groups", [{"match": "*", "rat": 1}], "optimizer.groups.0.rat is unknown: did you mean 'rate'?"),
        ("optimizer.groups", [{"match": "*", "rate": -1}], "rate=-1.0: expected a finite number >= 0"),
    ],
)
def test_mistakes_are_named(tmp_path, path, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_table(RunConfig, changed(table(tmp_path), path, value))


def test_there_is_a_mesh_or_a_choice(tmp_path):
    values = changed(table(tmp_path), "mesh", {"data": 2})
    with pytest.raises(ValueError, match=r"mesh={'data': 2, .*}: expected none, since meshes is given"):
        from_table(RunConfig, values | {"meshes": [{"data": 4}]})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set seed: expected key=value"),
        ("phases.3.steps=1", "--set phases.3.steps=1: phases has the entries 0 to 2, not 3"),
        ("seed.x=1", "--set seed.x=1: seed is 0, expected a table"),
        ("sed=1", "sed is unknown: did you mean 'seed'?"),
        ("seed=one", "seed='one': expected an integer"),
    ],
)
def test_overrides_that_are_wrong(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(EXAMPLE, [override])


def test_a_file_that_is_no_toml(tmp_path):
    (tmp_path / "run.toml").write_text("seed = = 1")
    with pytest.raises(ValueError, match=r"run\.toml is not valid: Invalid value \(at line 1, column 8\)"):
        load_config(tmp_path / "run.toml")


def test_what_may_change_when_a_run_goes_on(tmp_path):
    values = table(tmp_path)
    before = from_table(RunConfig, values)
    for path, value in {
        "mesh": {"data": 2},
        "meshes": [{"data": 2}, {"data": 4, "tensor": 2}],
        "directory": "/elsewhere",
        "checkpoints.every": 2,
        "evaluation.every": 2,
        "logging.every": 2,
        "max_skipped": 2,
        "step": {"remat": "layer", "microbatches": 2, "compute_dtype": "bfloat16"},
        "phases": [*values["phases"], {"name": "third", "steps": 3, "shares": {"b": 1.0}}],
        "sources": {**values["sources"], "c": values["sources"]["b"]},
    }.items():
        assert differences(before, from_table(RunConfig, changed(values, path, value))) == [], path
    after = changed(values, "step", {"z_loss": 1e-4})
    assert differences(before, from_table(RunConfig, after)) == ["step.z_loss: 0.0 before, 0.0001 now"]
    after = changed(changed(values, "phases.1.steps", 9), "sources.a.field", "content")
    assert differences(before, from_table(RunConfig, after)) == [
        "sources.a.field: 'text' before, 'content' now",
        "phases.1.steps: 6 before, 9 now",
    ]
    shorter = dataclasses.replace(before, phases=before.phases[:1])
    assert "phases.1.name: 'second' before, None now" in differences(before, shorter)
