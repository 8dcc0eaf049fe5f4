"""Trackers as reporters, against modules that record what they are given, and the real one where it is installed."""

import dataclasses
import json
import sys
import types
import warnings

import pytest
from rich.console import Console

from tests.train.runs import config, table
from zamba2_jax.train import run as run_module
from zamba2_jax.train import trackers
from zamba2_jax.train.config import RunConfig, from_table
from zamba2_jax.train.metrics import EvalRecord, TrainRecord
from zamba2_jax.train.trackers import open_trackers

TRAIN = TrainRecord(
    phase="p", step=3, loss=2.5, grad_norm=1.0, learning_rate=0.1, tokens=30, seconds=1.5, skipped=0, waited=0.0
)
EVAL = EvalRecord(phase="p", step=3, held_out="prose", loss=2.0, accuracy=0.25)


class Service:
    """A module that is a tracker: `calls` are what it is given."""

    def __init__(self, monkeypatch, name, *, step=0, failing=()):
        self.calls, self.step, self._failing = [], step, failing
        module = types.ModuleType(name)
        module.init, module.Settings = self.init, dict
        module.__spec__ = types.SimpleNamespace(name=name)
        monkeypatch.setitem(sys.modules, name, module)

    def _note(self, name, *arguments):
        if name in self._failing:
            raise ConnectionError(f"{name} did not reach anything")
        self.calls.append((name, *arguments))
        return self

    def init(self, **options):
        return self._note("init", options)

    def log(self, values, step):
        self._note("log", values, step)

    def finish(self, exit_code=None):
        self._note("finish", exit_code)


def asking(path, chosen):
    return config(path, logging={"every": 3, "tensorboard": False, "health_every": 0, "trackers": chosen})


def opened(values, directory):
    return [*open_trackers(values, directory, values.model.resolve())]


def test_records_go_to_each_tracker_and_a_run_that_goes_on_is_the_same_one(tmp_path, monkeypatch):
    chosen = {
        "wandb": {"project": "p", "tags": ["a", "b"], "mode": "offline"},
        "trackio": {"name": "n", "space_id": "o/s"},
    }
    wandb, trackio = Service(monkeypatch, "wandb"), Service(monkeypatch, "trackio")
    values = asking(tmp_path, chosen)
    for _ in range(2):
        for tracker in opened(values, tmp_path / "trackers"):
            with tracker:
                tracker(TRAIN)
                tracker(EVAL)
    for service in (wandb, trackio):
        half = len(service.calls) // 2
        assert service.calls[:half] == service.calls[half:]  # the same id, too
        (_, options), (_, train, first), (_, held_out, second), (end, _) = service.calls[:half]
        assert (train["train/loss"], train["train/tokens_per_second"], first) == (2.5, 20, 3)
        assert (held_out["eval/prose/accuracy"], second) == (0.25, 3)
        assert options["config"]["learning_rate"] == values.learning_rate
        assert options["config"]["architecture"]["d_state"] == 6
        assert (end, options["resume"]) == ("finish", "allow")
    options = wandb.calls[0][1]
    assert (options["project"], options["name"], options["tags"], options["mode"]) == (
        "p",
        "run",
        ("a", "b"),
        "offline",
    )
    assert options["id"] == json.loads((tmp_path / "trackers" / "wandb.json").read_text())["id"]
    assert wandb.calls[-1] == ("finish", 0)
    options = trackio.calls[0][1]
    assert (options["project"], options["space_id"]) == ("zamba2-jax", "o/s")
    assert options["name"].startswith("n-")


def test_steps_that_wandb_has_are_not_sent_again_and_a_failed_run_is_marked(tmp_path, monkeypatch):
    wandb = Service(monkeypatch, "wandb", step=4)
    (tracker,) = opened(asking(tmp_path, ["wandb"]), tmp_path / "trackers")
    tracker(TRAIN)
    tracker(dataclasses.replace(TRAIN, step=4))
    tracker.__exit__(KeyError, KeyError(), None)
    assert [call[2] for call in wandb.calls if call[0] == "log"] == [4]
    assert wandb.calls[-1] == ("finish", 1)


def test_a_tracker_that_fails_later_is_warned_of_once(tmp_path, monkeypatch):
    Service(monkeypatch, "trackio", failing=("log", "finish"))
    (tracker,) = opened(asking(tmp_path, ["trackio"]), tmp_path / "trackers")
    with warnings.catch_warnings(record=True) as caught, tracker:
        warnings.simplefilter("always")
        tracker(TRAIN)
        tracker(EVAL)
    (warning,) = caught
    assert str(warning.message).startswith("trackio lacks numbers of this run, which goes on: ConnectionError")


def test_a_tracker_that_is_not_there_or_does_not_start_is_an_error_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "compile_train_step", lambda *args, **kwargs: pytest.fail("it was compiled"))
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb is not installed: pip install 'zamba2-jax\[wandb\]'"):
        run_module.run(asking(tmp_path, ["wandb"]), Console(quiet=True))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    monkeypatch.undo()
    Service(monkeypatch, "wandb", failing=("init",))
    monkeypatch.setattr(run_module, "compile_train_step", lambda *args, **kwargs: pytest.fail("it was compiled"))
    with pytest.raises(ValueError, match=r"logging.trackers.wandb does not start: init did not reach.*; mode = \"off"):
        run_module.run(asking(tmp_path, ["wandb"]), Console(quiet=True))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["wanbd"], r"logging.trackers.wanbd is unknown: did you mean 'wandb'\?"),
        ([3], r"logging.trackers is \[3\]: expected a table"),
        ({"wandb": {"mode": "off"}}, "logging.trackers.wandb.mode='off': expected one of online, offline"),
    ],
)
def test_mistakes_are_named(tmp_path, chosen, message):
    with pytest.raises(ValueError, match=message):
        from_table(RunConfig, table(tmp_path, logging={"trackers": chosen}))


def test_wandb_itself_writes_the_run_without_a_network(tmp_path):
    pytest.importorskip("wandb", reason="needs the extra wandb, which is not installed")
    values = asking(tmp_path, {"wandb": {"mode": "offline"}})
    for step in (3, 6):
        (tracker,) = opened(values, tmp_path / "trackers")
        with tracker:
            tracker(dataclasses.replace(TRAIN, step=step))
    id_ = json.loads((tmp_path / "trackers" / "wandb.json").read_text())["id"]
    files = sorted((tmp_path / "trackers" / "wandb").glob(f"offline-run-*-{id_}/run-{id_}.wandb"))
    assert all(b"train/loss" in file.read_bytes() for file in files)
    assert files
