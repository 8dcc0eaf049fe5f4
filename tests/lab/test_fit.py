import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from tests.train.runs import config, table
from zamba2_jax import Result, fit
from zamba2_jax.checkpoint.history import Checkpoints
from zamba2_jax.evaluate import necessity
from zamba2_jax.lab import fitting
from zamba2_jax.parallel.hosts import run_mesh
from zamba2_jax.train.config import RunConfig, from_table
from zamba2_jax.train.metrics import read_records
from zamba2_jax.train.run import open_data, run
from zamba2_jax.train.step import abstract_state

QUIET = Console(quiet=True)
TIMES = ("seconds", "waited", "memory", "tokens_per_second")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def base(home):
    return config(home)


@pytest.fixture(scope="module")
def single(home):
    """What `zamba2 train` makes of the seed and the rate that the others are held to: records and parameters."""
    values = config(home, directory=str(home / "single"), seed=1, learning_rate=3e-2)
    assert run(values, QUIET)
    optimizer = values.optimizer.transformation()
    with Checkpoints(Path(values.directory) / "checkpoints", read_only=True) as checkpoints:
        like = abstract_state(values.model.resolve(), optimizer, run_mesh(values.mesh), values.dtype)
        state = checkpoints.restore(checkpoints.steps[-1], like)[0]
    records = read_records(Path(values.directory) / "metrics.jsonl")
    return [record for record in records if record["kind"] != "goodput"], state.model


@pytest.fixture(scope="module")
def threads(base):
    return fit(base, seeds=(0, 1), overrides={"learning_rate": [1e-2, 3e-2]}, together="threads", console=QUIET)


def numbers(records):
    """All of the records but times, as one array, and what they are of."""
    names, found = [], []

    def collect(value, name):
        if isinstance(value, dict):
            for key, inner in value.items():
                if key not in TIMES:
                    collect(inner, f"{name}/{key}")
        elif isinstance(value, list | tuple):
            for i, inner in enumerate(value):
                collect(inner, f"{name}/{i}")
        else:
            names.append(f"{name}={value}" if isinstance(value, str) else name)
            found.append(np.nan if value is None or isinstance(value, str) else value)

    for number, record in enumerate(records):
        collect(record, str(number))
    return names, np.array(found, np.float64)


def assert_same(records, others, rtol):
    (names, found), (other_names, expected) = numbers(records), numbers(others)
    assert names == other_names
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-7)


def assert_same_parameters(model, other, atol):
    for leaf, expected in zip(jax.tree.leaves(model), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(leaf, expected, atol=atol)


@pytest.mark.parametrize("together", ["threads", "vmap"])
def test_runs_together_are_those_alone(base, single, threads, together):
    """Records with health and the final evaluation, and parameters: float32, other sums, 13 steps of Adam.

    Of parameters about 0.1 an update is 3e-2 at most, whatever the gradient; where that is near 0 rounding turns it.
    """
    grid = {"learning_rate": [1e-2, 3e-2]}
    if together == "threads":
        result = threads
    else:
        result = fit(base, seeds=(0, 1), overrides=grid, together=together, console=QUIET)
    assert result.variants == ["learning_rate=0.01", "learning_rate=0.03"]
    (_, found) = result["learning_rate=0.03"]
    records, model = single
    assert (found.seed, found.status) == (1, "finished")
    assert_same(found.records, records, rtol=2e-4)
    assert_same_parameters(found.model(), model, atol=2e-4)
    last = [record for record in records if record["kind"] == "eval"][-1]
    expected = {f"unseen.{key}": last[key] for key in ("loss", "accuracy", "bits_per_byte")}
    assert found.metrics == pytest.approx(expected, rel=2e-4)
    others = [outcome.metrics["unseen.loss"] for outcome in result.outcomes]
    assert len(set(others)) == len(others)


def test_a_run_over_a_mesh_is_that_on_one_device(home, single):
    """Its gradient is summed over two halves of the batch."""
    divided = _with(home, mesh={"data": 2}, learning_rate=3e-2)
    (found,) = fit(divided, seeds=(1,), console=QUIET).outcomes
    assert_same(found.records, single[0], rtol=2e-4)


def test_a_run_that_diverges_stops_no_other(base, threads):
    """Its scale of the embedding makes the first loss infinite; one program trains it and the others."""
    wild = dataclasses.replace(base, init_scale={"embed": 1e30}, max_skipped=2)
    steady = dataclasses.replace(base, max_skipped=2)
    for together in ("threads", "vmap"):
        result = fit({"wild": wild, "steady": steady}, seeds=(0, 1), together=together, console=QUIET)
        assert [outcome.status for outcome in result.outcomes] == ["diverged"] * 2 + ["finished"] * 2
        for outcome in result["wild"]:
            assert "2 steps in a row" in outcome.error
            assert not outcome.metrics
            with pytest.raises(ValueError, match=r"wild/seed-. diverged: it left no model"):
                outcome.model()
        for outcome, other in zip(result["steady"], threads["learning_rate=0.01"], strict=True):
            assert_same(outcome.records, other.records, rtol=2e-4)
        row = result.table(baseline="steady")["wild", "unseen.loss"]
        assert (row.n, row.diverged) == (0, 2)


class KilledError(Exception):
    """Stands for the end of the process."""


def test_a_killed_sweep_goes_on_with_what_is_left(base, threads, home):
    directory, finished = home / "sweep", []
    grid = {"learning_rate": [1e-2, 3e-2]}

    def die(name, record):
        done = sorted(path.parent.name for path in (directory / "learning_rate=0.01").glob("*/result.json"))
        if done == ["seed-0", "seed-1"] and name.startswith("learning_rate=0.03") and record.step == 12:
            finished.extend(done)
            raise KilledError

    with pytest.raises(KilledError):
        fit(base, seeds=(0, 1), overrides=grid, directory=directory, together="turn", report=die, console=QUIET)
    assert finished
    (directory / "learning_rate=0.03" / "seed-0" / ".model.partial").mkdir()
    begun = directory / "learning_rate=0.03" / "seed-1"
    (begun / ".tokenizer.partial").mkdir(parents=True, exist_ok=True)
    (begun / "config.json").unlink(missing_ok=True)
    kept = [path.stat().st_mtime_ns for path in sorted(directory.glob("learning_rate=0.01/*/*"))]
    trained = []
    result = fit(
        base,
        seeds=(0, 1),
        overrides=grid,
        directory=directory,
        report=lambda name, record: trained.append(name),
        necessity=(),
        console=QUIET,
    )
    assert set(trained) == {f"learning_rate=0.03/seed-{seed}" for seed in (0, 1)}
    assert [path.stat().st_mtime_ns for path in sorted(directory.glob("learning_rate=0.01/*/*"))] == kept
    for outcome, other in zip(result.outcomes, threads.outcomes, strict=True):
        assert outcome.name == other.name
        assert_same(outcome.records, other.records, rtol=2e-4)
        assert_same_parameters(outcome.model(), other.model(), atol=2e-4)
    loaded = Result.load(directory)
    assert [outcome.metrics for outcome in loaded.outcomes] == [outcome.metrics for outcome in result.outcomes]
    other = home / "other"
    shutil.copytree(directory / "learning_rate=0.01" / "seed-0", other / "run" / "seed-0")
    (other / "sweep.json").write_text(json.dumps({"runs": ["run/seed-0"], "baseline": None}))
    with pytest.raises(ValueError, match=r"variant 'run': the run in .* has another config:\n  phases.0.steps: 7 befo"):
        fit(base, overrides={"phases.0.steps": 8}, directory=other, console=QUIET)


def test_what_is_saved_is_loaded_with_what_each_model_needs(base, home):
    result = fit(base, seeds=(3,), necessity=("all.*",), console=QUIET)
    (outcome,) = result.outcomes
    result.save(home / "saved")
    loaded = Result.load(home / "saved")
    (found,) = loaded.outcomes
    assert str(loaded.table()) == str(result.table())
    assert (found.records, found.necessity) == (outcome.records, outcome.necessity)
    assert_same_parameters(found.model(), outcome.model(), atol=0)
    with pytest.raises(FileExistsError, match="is there already"):
        result.save(home / "saved")
    rows = open_data(base, _tokenizer(base), 320, run_mesh(base.mesh)).held_out["unseen"]
    expected = necessity(outcome.model(), rows, select=("all.*",))
    measured = {part.part.name: part.increase for part in expected.silenced}
    names = {f"necessity.unseen.{name}": value for name, value in measured.items()}
    assert {key: value for key, value in outcome.metrics.items() if key in names} == pytest.approx(names, abs=1e-6)


def _tokenizer(values):
    return fitting.layout.open_tokenizer(values, None, 320)


def test_mistakes_are_found_before_the_first_step(base, home, monkeypatch):
    monkeypatch.setattr(fitting, "train", lambda *args, **kwargs: pytest.fail("a step was taken"))
    two = {"a": base, "b": base}
    for arguments, message in (
        ({"configs": base, "overrides": {"learning_rat": 1.0}}, "variant 'run': learning_rat is unknown: did you mean"),
        ({"configs": base, "overrides": {"learning_rate": [1e-3, 1e-3]}}, "two variants are named 'learning_rate=0.00"),
        ({"configs": {"a/b": base}}, "variant 'a/b': expected a name that a directory can have"),
        ({"configs": base, "seeds": (1, 1)}, r"seeds=\[1, 1\]: expected at least one, all distinct"),
        ({"configs": two, "baseline": "c"}, "baseline='c': expected one of a, b"),
        ({"configs": {"a": base, "b": _with(home, mesh={"data": 9})}}, "variant 'b': mesh data=9, .* needs 9 devices"),
        ({"configs": {"a": base, "b": _with(home, mesh={"data": 3})}}, "variant 'b': mesh data=3, .* not divide the b"),
        ({"configs": base, "necessity": ("every.*",)}, "variant 'run': necessity: 'every.*' matches no part"),
        ({"configs": base, "overrides": {"init_scale": {"embedd": 2.0}}}, "variant 'run': init_scale.embedd='embedd'"),
        ({"configs": {}}, "configs is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(**arguments, directory=home / "wrong", console=QUIET)
        assert not list((home / "wrong").glob("[!.]*"))
    monkeypatch.setattr(fitting, "available_memory", lambda: 100_000)
    wide = dataclasses.replace(base, learning_rate=1e-3, length=31)
    with pytest.raises(ValueError, match=r"variant 'a': 0.0 GB are needed, 0.0 GB are free: expected a smaller model"):
        fit({"a": base, "b": wide}, console=QUIET)


def _with(home, **changes):
    return from_table(RunConfig, table(home, **changes))


def test_the_page_s_example_runs(monkeypatch, tmp_path):
    """On a smaller model, for a few steps, evaluated on a batch of each source."""
    page = (Path(__file__).parents[2] / "docs" / "lab.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    small = (
        "vocab_size=512, hidden_size=16, num_layers=2, hybrid_layer_ids=(0, 1), mamba_heads=2, d_state=8, ffn_size=24"
    )
    for old, new in (
        ("(240, 240, 840)", "(2, 2, 2)"),
        ('preset("zamba2-nano"', f'preset("zamba2-nano", {small}'),
        ("range(4)", "range(2)"),
        ("steps=STEPS", "steps=STEPS, length=32, batch_size=16"),
    ):
        assert old in code
        code = code.replace(old, new)

    def open_a_little(*arguments):
        data = open_data(*arguments)
        return data._replace(held_out={name: rows[:1] for name, rows in data.held_out.items()})

    monkeypatch.setattr(fitting, "open_data", open_a_little)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    row = names["result"].table()["one block", "prose.loss"]
    assert (row.n, row.difference.paired) == (2, True)
    assert names["model"].config.num_shared_blocks == 1
    assert (tmp_path / "shared-blocks.png").stat().st_size > 10_000
