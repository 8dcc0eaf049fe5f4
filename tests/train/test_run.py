import dataclasses
import errno
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer

from tests.train.runs import ARCHITECTURE, config, losses, numbers, table
from zamba2_jax.checkpoint.hf import load_hf
from zamba2_jax.checkpoint.history import Checkpoints
from zamba2_jax.cli.main import main
from zamba2_jax.parallel.hosts import run_mesh
from zamba2_jax.text.vocabulary import train_tokenizer
from zamba2_jax.train import run as run_module
from zamba2_jax.train.config import RunConfig, from_table
from zamba2_jax.train.directory import NAMES, TRACKERS, claim
from zamba2_jax.train.loop import DivergedError
from zamba2_jax.train.metrics import as_record, read_records
from zamba2_jax.train.run import run
from zamba2_jax.train.step import abstract_state
from zamba2_jax.train.supervisor import Lifeline

QUIET = Console(quiet=True)


@pytest.fixture
def stop_at(monkeypatch):
    """Has SIGTERM come just before a step."""
    compile_train_step, stop = run_module.compile_train_step, []

    def compile_stopping(*args, **kwargs):
        step = compile_train_step(*args, **kwargs)

        def stopping(state, batch):
            if int(state.step) + 1 in stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(state, batch)

        return stopping

    monkeypatch.setattr(run_module, "compile_train_step", compile_stopping)
    return stop.append


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def test_how_a_step_is_computed_changes_no_losses(home, whole):
    """By parts, recomputed and scanned: sums in another order, over 13 steps; in bfloat16 the losses are only near."""
    expected = np.array(losses(records_of(whole)))
    for step, tolerance in (
        ({"microbatches": 2, "remat": "layer", "scan_layers": True}, 1e-5),
        ({"compute_dtype": "bfloat16"}, 1e-2),
    ):
        values = config(home, directory=str(home / "-".join(step)), step=step)
        assert run(values, QUIET)
        found = losses(records_of(values))
        np.testing.assert_allclose(found, expected, rtol=tolerance)
        assert not np.array_equal(found, expected)
        health = [health_of(of)["calls"]["layers.0"] for of in (values, whole)]
        np.testing.assert_allclose(*(of["ratio"] for of in health), rtol=100 * tolerance)
        np.testing.assert_allclose(*(of["entropy"] for of in health), rtol=100 * tolerance)


@pytest.fixture(scope="module")
def whole(home):
    """A run that was never interrupted."""
    logging = {"every": 3, "health_every": 13, "tensorboard": True, "profile_start": 2, "profile_steps": 1}
    values = config(home, directory=str(home / "whole"), logging=logging)
    assert run(values, QUIET)
    return values


def last_state(values):
    mesh, optimizer = run_mesh(values.mesh), values.optimizer.transformation()
    with Checkpoints(Path(values.directory) / "checkpoints", read_only=True) as checkpoints:
        like = abstract_state(values.model.resolve(), optimizer, mesh, values.dtype)
        return checkpoints.restore(checkpoints.steps[-1], like)[0]


def records_of(values):
    return read_records(Path(values.directory) / "metrics.jsonl")


def health_of(values):
    (health,) = (record for record in records_of(values) if record["kind"] == "health")
    return health


def assert_equal(tree, other):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_leaves_what_it_says(whole):
    found = {path.name for path in Path(whole.directory).iterdir()}
    assert found == {*NAMES, ".lock"} - {TRACKERS}
    records = records_of(whole)
    steps = {kind: [record["step"] for record in records if record["kind"] == kind] for kind in ("train", "eval")}
    assert steps == {"train": [3, 5, 6, 7, 10, 12, 13], "eval": [0, 5, 7, 12, 13]}
    assert losses(records)[-1] < losses(records)[0] - 0.3
    (source,) = whole.evaluation.sources.values()
    texts = [json.loads(line)["text"] for line in Path(source.path).read_text().splitlines()]
    tokenizer = Tokenizer.from_file(str(Path(whole.tokenizer) / "tokenizer.json"))
    tokens = sum(len(tokenizer.encode(text, add_special_tokens=False).ids) + 2 for text in texts)
    bits = records[0]["loss"] / math.log(2) * tokens / sum(map(len, texts))
    assert records[0]["bits_per_byte"] == pytest.approx(bits)
    trained = [record for record in records if record["kind"] == "train"]
    assert all(record["memory"] > 2**27 and 0 <= record["waited"] <= record["seconds"] for record in trained)
    assert [record["utilisation"] for record in trained] == [None] * len(trained)  # nobody knows the peak of a CPU
    assert list((Path(whole.directory) / "profile").rglob("*.xplane.pb"))
    spent = [as_record(record) for record in records if record["kind"] == "goodput"]
    assert [of.step for of in spent] == [0, 4, 8, 12, 13]
    assert all(earlier.seconds < later.seconds for earlier, later in itertools.pairwise(spent))
    assert all(seconds > 0 for seconds in spent[-1].parts.values())
    waited = sum(record["waited"] for record in trained)
    assert waited <= spent[-1].data < waited + 0.1


def test_a_run_that_is_told_to_stop_goes_on_as_if_it_never_had(home, whole, stop_at):
    values = config(home, directory=str(home / "stopped"))
    for step in (2, 6, 7, 11):  # between two records, at the end of one, at the end of a phase, in the second phase
        stop_at(step)
        assert not run(values, QUIET)
        assert int(last_state(values).step) == step
        with (home / "stopped" / "metrics.jsonl").open("a") as metrics:
            metrics.write('{"kind": "tra')  # as a kill in the middle of a line leaves it
    console = Console(file=io.StringIO(), width=300)
    assert run(values, console)
    spent = [as_record(record) for record in records_of(values) if record["kind"] == "goodput"]
    assert [of.first for of in sorted(spent, key=lambda of: (of.began, of.step))] == [
        *(0, 0, 2, 2, 2, 6, 6, 7, 7, 7, 11, 11, 11)  # at the start, at a checkpoint, and at the end
    ]
    assert re.search(r"Of \d+ s: steps \d+\.\d%, .* lost \d+\.\d%", console.file.getvalue())
    for _ in range(2):  # there is nothing to do
        assert run(values, QUIET)
        assert_equal(last_state(values), last_state(whole))
        assert numbers(records_of(values)) == numbers(records_of(whole))


def test_phases_can_be_appended(home, whole):
    shutil.copytree(whole.directory, home / "longer")
    third = {"name": "third", "steps": 2, "shares": {"b": 1.0}}
    values = config(home, directory=str(home / "longer"), phases=[*table(home)["phases"], third])
    assert run(values, QUIET)
    assert [record["step"] for record in records_of(values) if record.get("phase") == "third"] == [15, 15]


@pytest.mark.slow
def test_a_run_goes_on_over_other_meshes(home, whole, stop_at):
    meshes = [{"data": 2, "fsdp": 2, "tensor": 2}, {"sequence": 2, "tensor": 2}, {"fsdp": 2}]
    directory = str(home / "meshes")
    for step, mesh in zip((4, 9, None), meshes, strict=True):
        stop_at(step)
        values = config(home, directory=directory, mesh=mesh)
        assert run(values, QUIET) == (step is None)
        state = last_state(values)
        # The moments of the optimizer are where their parameters are.
        mu = state.opt_state[1].mu
        assert mu.embed[...].sharding == state.model.embed[...].sharding
        assert len(mu.embed[...].sharding.device_set) == math.prod(mesh.values())
    np.testing.assert_allclose(
        *(losses(records_of(run_))[:12] for run_ in (values, whole)), rtol=1e-5
    )  # sums in another order, over 13 steps


def test_an_export_is_the_model_and_a_run_can_begin_with_it(home, whole, tmp_path, capsys):
    out = tmp_path / "hf"
    assert main(["export", "--run", whole.directory, "--step", "13", "--output", str(out)]) == 0
    model = load_hf(out)
    assert model.config == whole.model.resolve()
    with Checkpoints(Path(whole.directory) / "checkpoints", read_only=True) as checkpoints:
        assert_equal(model, checkpoints.restore_part(13, model, "model"))
    assert Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab_size() == 320
    assert main(["export", "--run", whole.directory, "--step", "5", "--output", str(tmp_path / "other")]) == 2
    assert "no checkpoint of step 5" in capsys.readouterr().err
    assert main(["export", "--run", str(tmp_path), "--output", str(tmp_path / "other")]) == 2
    assert f"{tmp_path} is not the directory of a run" in capsys.readouterr().err

    further = config(home, directory=str(tmp_path / "further"), model={"hf": str(out)}, tokenizer=str(out))
    assert run(further, QUIET)
    start = records_of(further)[0]
    assert (start["kind"], start["step"]) == ("eval", 0)
    (end,) = [record["loss"] for record in records_of(whole) if (record["kind"], record["step"]) == ("eval", 13)]
    assert start["loss"] == end


def test_a_run_on_token_files_has_their_tokenizer(tmp_path):
    table(tmp_path)
    for name in "ab":
        words = f"--input {tmp_path / name}.jsonl --output {tmp_path / name} --tokenizer {tmp_path / 'tokenizer'}"
        assert main(["tokenize", *words.split(), "--processes", "1"]) == 0
    sources = {name: {"kind": "tokens", "path": str(tmp_path / name)} for name in "ab"}
    phases = [{"name": "only", "steps": 1, "shares": {"a": 0.5, "b": 0.5}}]
    values = table(tmp_path, sources=sources, phases=phases)
    del values["tokenizer"]  # nor does the held-out text take one
    assert run(from_table(RunConfig, values), QUIET)
    assert main(["export", "--run", values["directory"], "--output", str(tmp_path / "hf")]) == 0
    for file in (tmp_path / "tokenizer").iterdir():
        assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes()

    other = train_tokenizer(["other words, other merges " * 9], 270)
    other.backend.save(str(tmp_path / "a" / "tokenizer.json"))
    with pytest.raises(ValueError, match="a: made by another tokenizer, of 320 tokens; expected the one given, of 270"):
        run(from_table(RunConfig, values | {"directory": str(tmp_path / "second")}), QUIET)


def test_a_run_that_diverges_ends_and_names_its_last_checkpoint(home, tmp_path):
    phases = [{"name": "steep", "steps": 40, "shares": {"a": 1.0}, "warmup_steps": 6, "decay": "constant"}]
    values = config(home, directory=str(tmp_path / "run"), phases=phases, learning_rate=1e37, max_skipped=5)
    (tmp_path / "orders.json").write_text(json.dumps({"skip_to": None}))
    with pytest.raises(DivergedError, match=r"5 steps in a row, .*; the last checkpoint is .*/checkpoints/\d+"):
        run(values, QUIET, Lifeline(tmp_path))
    step, phase, batch = json.loads((tmp_path / "diverged.json").read_text())
    assert (phase, batch) == ("steep", step + 4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(last_state(values).model)))
    assert "5 steps in a row" in (tmp_path / "run" / ".diverged").read_text()


def test_a_run_goes_back_and_leaves_batches_out_if_it_is_told_to(whole, tmp_path):
    shutil.copytree(whole.directory, tmp_path / "run")
    values = dataclasses.replace(whole, directory=str(tmp_path / "run"))
    (tmp_path / "orders.json").write_text(json.dumps({"cause": "why", "before": 12, "skip_to": ["second", 3]}))
    assert run(values, QUIET, Lifeline(tmp_path))
    assert int((tmp_path / "step").read_text()) == 13
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps == [8, 12, 13]
        note = json.loads((checkpoints.directory / "13" / "note" / "metadata").read_text())
    assert (note["done"], note["left_out"]) == (6, 2)  # step 8 took the first batch; the second and third are left out
    before, after = (losses(records_of(of)) for of in (whole, values))
    assert [a == b for a, b in zip(after, before, strict=True)] == [True] * 7 + [False] * 5
    assert records_of(values)[-1]["cause"] == "why"


@pytest.mark.filterwarnings("ignore")  # of Orbax, about what it leaves behind
def test_a_full_disk_ends_the_run_and_the_last_checkpoint_is_named(home, whole, tmp_path, monkeypatch):
    shutil.copytree(whole.directory, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "13")
    with monkeypatch.context() as full:
        # What is written with each checkpoint, by Orbax, from Python.
        full.setattr("orbax.checkpoint.JsonCheckpointHandler.async_save", no_space)
        with pytest.raises(OSError, match=r"No space left on device.*; the last checkpoint is .*/run/checkpoints/12$"):
            run(dataclasses.replace(whole, directory=str(tmp_path / "run")), QUIET)
    rest = dataclasses.replace(whole, directory=str(tmp_path / "run"))
    assert run(rest, QUIET)
    assert_equal(last_state(rest), last_state(whole))


def test_a_device_without_enough_memory_is_named(home, tmp_path, monkeypatch):
    def no_memory(state, batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 133.32GiB.\nMore")

    monkeypatch.setattr(run_module, "compile_train_step", lambda *args, **kwargs: no_memory)
    message = (
        "memory of the devices (RESOURCE_EXHAUSTED: Out of memory while trying to allocate 133.32GiB.): expected more"
    )
    with pytest.raises(
        ValueError, match=re.escape(message + " step.microbatches than 1, step.remat, or a larger mesh")
    ):
        run(config(home, directory=str(tmp_path / "run")), QUIET)


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_mistakes_are_found_before_anything_is_written(home, tmp_path, capsys):
    run_path = tmp_path / "run"
    good = table(home, directory=str(run_path))
    (tmp_path / "bad.jsonl").write_text('{"txt": "x"}\n')
    (tmp_path / "file").write_text("")
    mistakes = [
        ({"mesh": {"data": 3, "tensor": 3}}, "needs 9 devices, all sizes >= 1; 8 are there"),
        ({"mesh": {"data": 3}}, "mesh data=3, fsdp=1 does not divide the batch, 8"),
        ({"tokenizer": str(tmp_path / "none")}, f"{tmp_path / 'none'} is neither a directory nor the id of a hub"),
        ({"tokenizer": None}, "a source of kind 'jsonl' takes a tokenizer"),
        ({"model": {"hf": str(tmp_path / "none")}}, f"{tmp_path / 'none'} is neither a directory nor the id of a hub"),
        ({"model": {"architecture": {**ARCHITECTURE, "vocab_size": 300}}}, "outside the vocabulary of 300 tokens"),
        ({"directory": str(tmp_path / "file")}, "file is a file: expected a directory for the run"),
        ({"directory": str(tmp_path)}, "holds bad.jsonl, file, run: expected a new directory, or that of a run"),
        ({"directory": "/proc/run"}, "/proc/run"),
    ]
    mistakes += [
        ({"sources": {**good["sources"], "b": {"kind": "jsonl", "path": str(tmp_path / name)}}}, message)
        for name, message in (("none", "none: no such file or directory"), ("bad.jsonl", "bad.jsonl, line 1: expected"))
    ]
    for changes, message in mistakes:
        with pytest.raises((ValueError, OSError), match=re.escape(message)):
            run(config(home, **{**good, **changes}), QUIET)
        assert not run_path.exists() or [path.name for path in run_path.iterdir()] == [".lock"]


def test_another_run_in_the_directory_is_left_alone(home, whole):
    other = dataclasses.replace(whole, seed=1, batch_size=4)
    with pytest.raises(
        ValueError, match=r"with another config:\n  batch_size: 8 before, 4 now\n  seed: 0 before, 1 now"
    ):
        run(other, QUIET)
    with claim(Path(whole.directory)), pytest.raises(BlockingIOError, match="another process is running in"):
        run(whole, QUIET)
