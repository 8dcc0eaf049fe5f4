"""Of directories written by hand, in the form that `zamba2 train` writes, whose numbers are known."""

import json
import re
from pathlib import Path

import pytest

from tests.train.runs import config
from zamba2_jax.cli.main import main
from zamba2_jax.lab.runs import differing, read_runs
from zamba2_jax.train.directory import claim, write_run
from zamba2_jax.train.metrics import (
    CallHealth,
    EvalRecord,
    GoodputRecord,
    GroupHealth,
    HealthRecord,
    JsonLines,
    TrainRecord,
)


def train(step, loss, **changes):
    values = {"phase": "first", "grad_norm": 1.0, "learning_rate": 0.1, "tokens": 40, "seconds": 2.0, "skipped": 0}
    return TrainRecord(step=step, loss=loss, **{**values, **changes})


def held_out(step, loss, name="unseen"):
    return EvalRecord(phase="first", step=step, held_out=name, loss=loss, accuracy=loss / 10)


def idle(step):
    call = CallHealth(ratio=0.001, share=0.5, entropy=(0.5, float("nan")))
    group = GroupHealth(grad_norm=1.0, update=1.0, step=float("nan"))
    return HealthRecord(phase="first", step=step, calls={"layers.0": call}, groups={"mixers": group})


def write(home, name, records, **changes):
    values = config(home, directory=str(home / "runs" / name), **changes)
    directory = Path(values.directory)
    directory.mkdir(parents=True)
    write_run(values, values.model.resolve(), None, directory)
    with JsonLines(directory / "metrics.jsonl") as report:
        for record in records:
            report(record)
    return directory


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Runs of 13 steps: one done, one that was interrupted twice, one that diverged, one that has not begun."""
    path = tmp_path_factory.mktemp("home")
    (path / "runs").mkdir()
    curve = [held_out(0, 6.0), train(5, 5.0), held_out(5, 3.0), train(13, 4.0, seconds=3.0), held_out(13, 3.5)]
    spent = GoodputRecord(step=13, first=0, began="2026-01-01T00:00:00+00:00", steps=6.0, compile=1.5, data=0.5)
    write(path, "done", [*curve, idle(1), idle(6), idle(11), spent])
    again = [train(3, 7.0), train(6, 6.0, tokens=1), train(6, 5.5, skipped=2), held_out(6, 4.25, "other")]
    directory = write(path, "sweep/half", again, learning_rate=2e-2, seed=1)
    with (directory / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind": "train", "step": 9, "lo')
    (write(path, "sweep/bad", [train(3, float("nan"))], learning_rate=3.0) / ".diverged").write_text("why")
    write(path, "sweep/new", [])
    return path


def shown(capsys, *words):
    assert main(["runs", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_directories_say_how_far_runs_are_and_with_what_numbers(home):
    runs = {run.name: run for run in read_runs([home / "runs", home / "runs" / "done"])}
    assert {name: run.status for name, run in runs.items()} == {
        "done": "finished",
        "sweep/bad": "diverged",
        "sweep/half": "stopped",
        "sweep/new": "stopped",
    }
    done = runs["done"].metrics
    assert (done["steps"], done["tokens"], done["tokens_per_second"], done["train/loss"]) == (13, 80, 16, 4.0)
    assert [done[f"eval/unseen/{key}"] for key in ("loss", "accuracy", "best_loss", "best_step")] == [3.5, 0.35, 3.0, 5]
    assert (done["goodput"], done["wall/compile"], done["wall/lost"], done["warnings"]) == (0.75, 1.5, 0.0, 1)
    assert "layers.0: the shared block is idle" in runs["done"].warnings[0]
    half = runs["sweep/half"].metrics
    assert (half["steps"], half["tokens"], half["train/loss"], half["skipped"]) == (6, 80, 5.5, 2)
    assert differing([*runs.values()]) == ["learning_rate", "seed"]
    with claim(home / "runs" / "done"):
        assert read_runs([home / "runs" / "done"])[0].status == "running"


def test_the_table_has_what_differs_and_the_differences(home, capsys):
    text = shown(capsys, home / "runs", "--sort", "learning_rate", "--baseline", "done")
    rows = [line for line in text.splitlines() if re.match(r"│ (done|sweep)", line)]
    assert [row.split()[1] for row in rows] == ["done", "sweep/new", "sweep/half", "sweep/bad"]
    assert "5.5000 (+1.5000)" in rows[2]
    assert "75.0%" in rows[0]
    assert "stopped at 6/13" in rows[2]
    assert "done: layers.0: the shared block is idle" in text
    text = shown(capsys, home / "runs", "--where", "seed=0", "learning_rate=1e-2", "--metrics", "steps")
    assert re.findall(r"│ (done|sweep\S*)", text) == ["done", "sweep/new"]
    assert "learning_rate" not in text


def test_all_is_written_as_json_and_drawn(home, tmp_path, capsys):
    file, picture = tmp_path / "runs.json", tmp_path / "runs.png"
    words = ["--json", file, "--plot", picture, "--where", "learning_rate=3", "--baseline", "done"]
    shown(capsys, home / "runs", *words)
    done, bad = json.loads(file.read_text(), parse_constant=lambda name: 1 / 0)
    assert (done["name"], done["metrics"]["train/loss"], done["differences"]["train/loss"]) == ("done", 4.0, 0.0)
    assert (bad["status"], bad["settings"]["learning_rate"], bad["metrics"]["train/loss"]) == ("diverged", 3.0, None)
    assert bad["differences"]["tokens"] == -40
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "nothing: there is no such directory"),
        (["runs/done/empty"], "empty holds no run: expected a directory with config.json and architecture.json"),
        (["runs", "--where", "learning_rat=1"], "learning_rat is unknown: did you mean 'learning_rate'?"),
        (["runs", "--where", "seed"], "--where seed: expected key=value"),
        (["runs", "--where", "seed=7"], "--where seed=7: no run has it, only 0, 1"),
        (["runs", "--metrics", "loss"], "--metrics loss: no run has it, expected some of steps, tokens, seconds"),
        (["runs", "--sort", "los"], "--sort los: no run has it, expected a setting, or one of steps, tokens"),
        (["runs", "--baseline", "don"], "--baseline don: there is no such run: did you mean 'done'?"),
        (["runs", "--plot", "x.txt"], "--plot x.txt: expected a .png in a directory that is there"),
        (["runs", "--json", "no/x.json"], "--json no/x.json: there is no directory no"),
    ],
)
def test_mistakes_are_named(home, capsys, monkeypatch, words, message):
    (home / "runs" / "done" / "empty").mkdir(exist_ok=True)
    monkeypatch.chdir(home)
    assert main(["runs", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_broken_file_is_named(home, capsys, tmp_path):
    directory = write(tmp_path, "broken", [train(3, 1.0)])
    (directory / "metrics.jsonl").write_text("{\n{}\n")
    assert main(["runs", str(directory)]) == 2
    assert "metrics.jsonl, line 1 is not valid JSON" in capsys.readouterr().err
    (directory / "metrics.jsonl").write_text('{"kind": "train", "step": 3}\n')
    assert main(["runs", str(directory)]) == 2
    assert "is not a record" in capsys.readouterr().err
    (directory / "config.json").write_text("{")
    assert main(["runs", str(directory)]) == 2
    assert "config.json is not valid JSON" in capsys.readouterr().err
