import json

import pytest

from tests.train.runs import ARCHITECTURE, table
from zamba2_jax.cli.main import main


def toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


@pytest.fixture
def write(tmp_path):
    def write(sweep, **changes):
        values = table(tmp_path, phases=[{"name": "only", "steps": 3, "shares": {"a": 1.0}}], **changes)
        lines = [f"{key} = {toml(value)}" for key, value in values.items()]
        (tmp_path / "sweep.toml").write_text("\n".join([*lines, f"sweep = {toml(sweep)}"]))
        return ["sweep", "--config", str(tmp_path / "sweep.toml")]

    return write


def test_a_grid_and_a_list_make_a_table(write, tmp_path, capsys):
    small = {"model.architecture.ffn_size": 16}
    words = write(
        {
            "seeds": [0, 1],
            "grid": {"learning_rate": [1e-2, 2e-2]},
            "variants": [{"name": "base"}, {"name": "small", "set": small}],
            "baseline": "base,learning_rate=0.01",
        }
    )
    words += ["--output", str(tmp_path / "out"), "--json", str(tmp_path / "table.json")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "Compiling program 2 of 2, for 4 runs of 'small,learning_rate=0.01', 'small,learning_rate=0.02'" in printed
    rows = json.loads((tmp_path / "table.json").read_text())
    assert {(row["variant"], row["n"]) for row in rows} == {
        (f"{name},learning_rate={rate}", 2) for name in ("base", "small") for rate in (0.01, 0.02)
    }
    for variant, size in (("base", ARCHITECTURE["ffn_size"]), ("small", 16)):
        run = tmp_path / "out" / f"{variant},learning_rate=0.02" / "seed-1"
        assert json.loads((run / "architecture.json").read_text())["ffn_size"] == size
        assert json.loads((run / "config.json").read_text())["seed"] == 1
        assert (run / "model" / "tokenizer.json").is_file()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*/*")}
    assert main(words) == 0
    assert "8 of 8 runs are done already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"seed": [0]}, "sweep.seed is unknown: did you mean 'seeds'?"),
        ({"grid": {"learning_rat": [1.0]}}, "variant 'learning_rat=1.0': learning_rat is unknown: did you mean"),
        ({"grid": {"learning_rate": 1.0}}, "sweep.grid.learning_rate=1.0: expected a list"),
        ({"variants": [{"name": "a"}, {"name": "a"}]}, "two variants are named 'a': expected distinct names"),
        ({"variants": [{"name": "a", "set": {"batch_size": 0}}]}, "variant 'a': batch_size=0: expected at least 1"),
        ({"baseline": "b"}, "sweep.baseline='b': expected one of run"),
        ({"variants": [{"name": "a", "set": {"mesh.data": 64}}]}, "variant 'a': mesh data=64"),
    ],
)
def test_mistakes_are_named(write, tmp_path, capsys, sweep, message):
    assert main(write(sweep)) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("[!.]*"))


def test_a_run_is_no_sweep(write, tmp_path, capsys):
    words = write({})
    path = tmp_path / "sweep.toml"
    path.write_text(path.read_text().replace("sweep = {}", ""))
    assert main(words) == 2
    assert "has no table [sweep]: expected one with seeds, grid or variants" in capsys.readouterr().err
