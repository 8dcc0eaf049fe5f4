"""docs/tpu.md: its commands parse, its configs load, its meshes divide what they divide; and the batch file runs."""

import importlib
import math
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from zamba2_jax.cli.main import COMMANDS, main
from zamba2_jax.cli.several import values
from zamba2_jax.models.registry import preset
from zamba2_jax.train.config import load_config

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tpu.md").read_text()
BATCH_FILE = ROOT / "examples" / "slurm.sbatch"
POD = ROOT / "examples" / "pod.toml"
END = ("&&", "&", ">", "2>&1", ";")


def zamba2_commands(script):
    """The words after `zamba2` of all its commands in a shell script, those in quotes for other hosts, too."""
    found = []
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for i, word in enumerate(words):
            if " " in word:
                found += zamba2_commands(word)
            elif word.endswith("zamba2") and words[i + 1 : i + 2] and words[i + 1] in COMMANDS:
                rest = words[i + 1 :]
                found.append(rest[: next((j for j, other in enumerate(rest) if other in END), len(rest))])
    return found


PAGE_COMMANDS = [words for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for words in zamba2_commands(block)]


@pytest.fixture
def parsed(monkeypatch):
    """Parses words as `zamba2` does, and gives the command without running it."""

    def parse(words):
        entry, made = COMMANDS[words[0]], []
        command = getattr(importlib.import_module(entry.module), entry.name)
        monkeypatch.setattr(command, "run", lambda self: made.append(self) or 0)
        assert main(words) == 0
        return made[0]

    return parse


def check_run(command):
    """The config of a `zamba2 train`, on the mesh it names."""
    assert (ROOT / command.config).is_file() or str(command.config) == "run.toml"
    config = load_config(POD, values(command.overrides))
    rows, mesh = config.batch_size // config.step.microbatches, config.mesh
    assert rows % (mesh.data * mesh.fsdp) == 0
    assert config.model.resolve().hidden_size % mesh.fsdp == 0
    return config


def test_there_is_a_command_for_each_part_of_a_run():
    assert {words[0] for words in PAGE_COMMANDS} == {"plan", "check", "tokenize", "train", "export", "generate"}


@pytest.mark.parametrize("words", PAGE_COMMANDS, ids=" ".join)
def test_commands_parse_and_their_runs_load(parsed, words):
    command = parsed(words)
    if words[0] == "train":
        check_run(command)
    if words[0] == "plan":
        shape, mesh = (re.findall(r"\d+", text) for text in (command.topology.split(":")[1], command.mesh))
        chips = math.prod(map(int, shape))
        assert math.prod(map(int, mesh)) == chips
        assert command.batch // (command.microbatches or 1) % chips == 0
        assert preset(command.preset).hidden_size % chips == 0


def test_what_is_planned_is_what_runs(parsed):
    """Both models: the architecture, rows, parts, mesh and dtype of the plan are those of the run."""
    planned = {}
    for words in PAGE_COMMANDS:
        if words[0] == "plan":
            of = parsed(words)
            numbers = of.batch, of.microbatches or 1, of.seq, of.remat or "layer"  # the defaults of a plan
            planned[of.preset] = (*numbers, of.compute_dtype, of.mesh)
    runs = {}
    for words in PAGE_COMMANDS:
        if words[:2] == ["train", "--distributed"]:
            of = check_run(parsed(words))
            step = of.step
            numbers = of.batch_size, step.microbatches, of.length, step.remat, step.compute_dtype
            runs[of.model.preset] = (*numbers, f"fsdp={of.mesh.fsdp}")
    assert planned == runs


@pytest.fixture
def submit(tmp_path):
    """Runs the batch file as a job of two nodes with four GPUs each; srun only writes down what it is to start."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").touch()
    srun = tmp_path / "bin" / "srun"
    srun.write_text(
        f'#!/bin/bash\nprintf "%q " "$@" >> {tmp_path}/started\necho >> {tmp_path}/started\nexit ${{CODE:-0}}\n'
    )
    srun.chmod(0o755)
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4", "VENV": str(tmp_path)}

    def submit(*arguments, **environment):
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        env = os.environ | job | environment | {"PATH": path}
        done = subprocess.run(["bash", str(BATCH_FILE), *arguments], env=env, capture_output=True, text=True)
        started = tmp_path / "started"
        return done, started.read_text().splitlines() if started.exists() else []

    return submit


def test_the_batch_file_checks_and_then_trains(submit, parsed):
    done, started = submit("run.toml", "directory=runs/with a space", "phases.0.steps=7000")
    assert done.returncode == 0, done.stderr
    [check], [train] = map(zamba2_commands_of_srun, started)
    assert parsed(check).distributed
    command = parsed(train)
    config = check_run(command)
    assert command.distributed
    assert (config.directory, config.phases[0].steps) == ("runs/with a space", 7000)
    assert (config.mesh.data, config.mesh.fsdp) == (2, 4)


def zamba2_commands_of_srun(line):
    words = shlex.split(line)
    return [words[words.index("zamba2") + 1 :]]


def test_a_wrong_number_on_any_gpu_stops_the_job(submit):
    done, started = submit("run.toml", CODE="1")
    assert done.returncode == 1
    assert len(started) == 1


def test_a_batch_file_without_a_run_says_what_it_wants(submit):
    done, started = submit()
    assert (done.returncode, started) == (2, [])
    assert "usage: sbatch examples/slurm.sbatch RUN.toml" in done.stderr


def test_what_the_batch_file_asks_slurm_for():
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?", BATCH_FILE.read_text(), re.MULTILINE))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]  # a process for each GPU, as JAX takes it
    assert asked["signal"].startswith("TERM@")  # what a run saves a checkpoint on, to the processes themselves
    assert "gpus-per-task" not in asked
