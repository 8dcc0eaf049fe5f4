import dataclasses
import importlib
import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.helpers import SMALL
from zamba2_jax.checkpoint.hf import load_hf
from zamba2_jax.checkpoint.store import restore_state
from zamba2_jax.cli.demo import OUTPUTS, SILENCED, SILENCED_WITHOUT_CALLS, Demo, prepare_output
from zamba2_jax.cli.main import COMMANDS, main
from zamba2_jax.models.registry import preset
from zamba2_jax.models.transformer.presets import LLAMA
from zamba2_jax.models.zamba2.presets import PRESETS
from zamba2_jax.train.recipe import optimizer
from zamba2_jax.train.step import init_state


@pytest.fixture
def small_preset(monkeypatch):
    monkeypatch.setitem(
        PRESETS, "small", dataclasses.replace(SMALL, num_layers=2, hybrid_layer_ids=(1,), vocab_size=300)
    )


WORDS = "--preset small --steps 4 6 8 --batch 8 --seq 64 --new-tokens 8 --learning-rate 0.02 --prompts".split()


def test_a_miniature_run(small_preset, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert main(["demo", "--output", str(out), *WORDS, "The class", "--prompts", "A [bold]"]) == 0
    assert {path.name for path in out.iterdir()} == set(OUTPUTS)

    printed = capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    losses = summary["held_out"]["prose"]
    assert losses["annealing"]["nats_per_token"] < losses["copying"]["nats_per_token"]
    for phase in ("copying", "pretraining", "annealing"):
        assert f"{losses[phase]['nats_per_token']:.3f}" in printed
        assert f"{losses[phase]['bits_per_byte']:.3f}" in printed
    assert "tokens/s" in printed
    assert 18 * 8 * 64 * 0.8 < summary["tokens"] <= 18 * 8 * 64  # rows of copying are not full
    for name, found in summary["necessity"].items():
        assert found["loss"] == pytest.approx(summary["held_out"][name]["annealing"]["nats_per_token"], rel=1e-5)
        for part in SILENCED:
            assert f"{found['silenced'][part]['increase']:+.3f}" in printed
    copying = summary["necessity"]["copying"]
    assert f"{copying['accuracy']:.0%} of the symbols right" in printed
    assert f"{copying['silenced']['all.attention']['accuracy']:.0%}." in printed
    assert set(summary["shared_output_over_residual"]) == {"layers.1"}
    assert "\nThe class" in printed
    assert "\nA [bold]" in printed
    assert (out / "samples.txt").read_text().startswith("The class")

    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {record["kind"] for record in records} == {"train", "health", "eval"}
    last = {record["held_out"]: record["loss"] for record in records if record["kind"] == "eval"}
    assert last == {name: of["annealing"]["nats_per_token"] for name, of in summary["held_out"].items()}

    model = load_hf(out / "hf")
    like = init_state(model, optimizer(model.config).transformation())
    state = restore_state(out / "checkpoint", like)
    assert int(state.step) == 18
    for a, b in zip(jax.tree.leaves(state.model), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(a, b)
    tokenizers = [Tokenizer.from_file(str(folder / "tokenizer.json")).to_str() for folder in (out, out / "hf")]
    assert tokenizers[0] == tokenizers[1]


def test_a_miniature_run_of_a_model_without_shared_blocks(monkeypatch, tmp_path, capsys):
    small = dataclasses.replace(preset("transformer-tiny"), num_layers=1, vocab_size=300)
    monkeypatch.setitem(LLAMA, "small-transformer", small)
    words = "--preset small-transformer --steps 1 2 3 --batch 4 --seq 32 --new-tokens 4".split()
    assert main(["demo", "--output", str(tmp_path), *words]) == 0
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["shared_output_over_residual"] == {}
    assert set(summary["necessity"]["prose"]["silenced"]) == {"all.attention", "all.mixer", "all.mlp"}
    for words in SILENCED_WITHOUT_CALLS.values():
        assert words in printed
    assert "shared" not in printed
    assert load_hf(tmp_path / "hf").config == small


def test_the_first_error_comes_before_anything_is_written(tmp_path, capsys):
    for words, message in (
        (["--seed", "-1"], "--seed is -1: expected an integer in [0, 2^31)"),
        (["--batch", "0"], "--batch is 0: expected at least 1"),
        (["--seq", "8"], "--seq is 8: expected at least 9"),
        (["--copying", "1"], "--copying is 1.0: expected a share in [0, 1)"),
        (["--steps", "3", "0", "5"], "phase 'pretraining': steps=0: expected an integer >= 1"),
        (["--replay", "1"], "--replay is 1.0: expected a share in [0, 1)"),
        (["--learning-rate", "-1"], "peak learning rate=-1.0: expected a finite number > 0"),
        (["--preset", "zamba2-9b"], "preset 'zamba2-9b' is unknown, expected one of"),
        (["--preset", "zamba2-tiny"], "--preset is 'zamba2-tiny': expected one of at least 259 tokens, not 97"),
        (["--prompts", ""], "--prompts holds an empty one: expected text"),
        (["--temperature", "-1"], "--temperature is -1.0"),
        (["--new-tokens", "0"], "--new-tokens is 0"),
    ):
        assert main(["demo", "--output", str(tmp_path / "out"), *words]) == 2, words
        captured = capsys.readouterr()
        assert captured.err.startswith(f"zamba2: error: {message}")
        assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_output_of_an_earlier_demo_is_replaced(tmp_path):
    prepare_output(tmp_path, {"seed": 1})
    (tmp_path / "checkpoint").mkdir()
    for name in ("checkpoint/array", "curves.png", ".curves.partial.png"):
        (tmp_path / name).touch()
    (tmp_path / "checkpoint.orbax-checkpoint-tmp-7").mkdir()
    prepare_output(tmp_path, {"seed": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]
    assert json.loads((tmp_path / "demo.json").read_text()) == {"seed": 2}


@pytest.mark.parametrize(("marked", "name"), [(False, "thesis.tex"), (False, "curves.png"), (True, "thesis.tex")])
def test_a_directory_with_other_files_is_refused_untouched(tmp_path, marked, name):
    if marked:
        prepare_output(tmp_path, {})
        (tmp_path / "hf").mkdir()
    (tmp_path / name).write_text("mine")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FileExistsError, match=f"holds {name}: expected a new or an empty directory"):
        prepare_output(tmp_path, {})
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_is_no_output_directory(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file: expected a directory"):
        prepare_output(tmp_path / "out", {})


def test_settings_of_the_demo_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Demo().seed = 1


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert "demo" in printed
    assert "parity" in printed


@pytest.mark.parametrize("entry", COMMANDS.values())
def test_summaries_are_the_first_lines_of_the_docstrings(entry):
    command = getattr(importlib.import_module(entry.module), entry.name)
    assert entry.summary == command.__doc__.splitlines()[0]


def test_help_of_a_command_explains_its_options(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    printed = capsys.readouterr().out
    for field in dataclasses.fields(Demo):
        assert f"--{field.name.replace('_', '-')}" in printed


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["dmeo"])
    assert exit_.value.code == 2
    assert "demo" in capsys.readouterr().err
