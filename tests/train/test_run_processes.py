"""Runs as processes: killed at any moment, and several that make one run."""

import json
import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.helpers import COMMAND
from tests.train.runs import config, losses, numbers, table
from zamba2_jax.checkpoint.history import Checkpoints
from zamba2_jax.parallel.hosts import run_mesh
from zamba2_jax.train.metrics import read_records
from zamba2_jax.train.step import abstract_state

PHASES = [
    {"name": "first", "steps": 30, "shares": {"a": 1.0}, "warmup_steps": 2},
    {"name": "second", "steps": 30, "shares": {"a": 0.5, "b": 0.5}, "decay": "linear"},
]


@pytest.fixture
def start(tmp_path):
    """Starts `zamba2 train` with a run in a directory, as a process with some devices."""
    running = []

    def start(directory, *options, devices=1, **changes):
        values = table(tmp_path, directory=str(tmp_path / directory), phases=PHASES, **changes)
        path = tmp_path / f"{directory}.json"
        path.write_text(json.dumps(values))
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment = os.environ | {"XLA_FLAGS": flags}
        command = [*COMMAND, "train", "--config", str(path), *options]
        with (tmp_path / f"{directory}.log").open("a") as log:
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        running.append(process)
        return process

    yield start
    for process in running:
        for child in children(process):
            os.kill(child, signal.SIGKILL)
        process.kill()
        process.communicate()


def children(process):
    """The processes that a process has started, by their ids."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def outcome(path, directory, **changes):
    """Records and last state of a run, on one device of this process."""
    values = config(path, directory=str(path / directory), phases=PHASES, **changes)
    like = abstract_state(
        values.model.resolve(), values.optimizer.transformation(), run_mesh(config(path).mesh), values.dtype
    )
    with Checkpoints(path / directory / "checkpoints", read_only=True) as checkpoints:
        state, _ = checkpoints.restore(checkpoints.steps[-1], like)
    return read_records(path / directory / "metrics.jsonl"), jax.device_get(state)


def assert_same(one, other):
    assert numbers(one[0]) == numbers(other[0])
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1]), strict=True):
        np.testing.assert_array_equal(a, b)


def wait_for_lines(path, count, process):
    """Waits until a file has so many lines, or the process has ended."""
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < count):
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_is_the_run_that_was_not(tmp_path, start):
    assert start("whole").wait(timeout=300) == 0
    metrics, chance, kills = tmp_path / "killed" / "metrics.jsonl", random.Random(0), 0
    for attempt in range(8):
        process = start("killed")
        if attempt < 5:
            lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            wait_for_lines(metrics, lines + chance.randint(1, 8), process)
            time.sleep(chance.uniform(0, 0.05))
            process.kill()
        kills += process.wait(timeout=300) == -signal.SIGKILL
        if process.returncode == 0:
            break
    assert kills >= 3
    assert process.returncode == 0
    assert_same(outcome(tmp_path, "killed"), outcome(tmp_path, "whole"))


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@pytest.mark.slow
def test_two_processes_make_one_run_and_survive_the_loss_of_one(tmp_path, start):
    mesh = {"data": 2, "tensor": 2}

    def start_both(directory, mesh=mesh):
        port = free_port()
        join = ("--coordinator", f"localhost:{port}", "--process-count", "2", "--process-id")
        return [start(directory, *join, str(number), devices=2, mesh=mesh) for number in (0, 1)]

    def finish(processes):
        return [process.wait(timeout=300) for process in processes]

    assert finish(start_both("whole")) == [0, 0]
    assert start("alone", devices=4, mesh=mesh).wait(timeout=300) == 0
    whole, alone = outcome(tmp_path, "whole"), outcome(tmp_path, "alone")
    # The rows are the same ones, in the same order; sums over processes are in another, which training
    # makes more of at every step.
    np.testing.assert_allclose(*(losses(run[0])[:15] for run in (whole, alone)), rtol=1e-5)

    metrics = tmp_path / "lost" / "metrics.jsonl"
    for lost in (1, 0):
        processes = start_both("lost")
        lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        wait_for_lines(metrics, lines + 5, processes[0])
        processes[lost].kill()
        begin = time.monotonic()
        assert processes[1 - lost].wait(timeout=120) not in (0, -signal.SIGKILL)
        assert time.monotonic() - begin < 100
    log = (tmp_path / "lost.log").read_text()
    assert "gives up" in log or "JAX distributed service detected fatal errors" in log

    processes = start_both("lost")
    wait_for_lines(metrics, metrics.read_bytes().count(b"\n") + 5, processes[0])
    processes[1].terminate()  # one has the signal, both stop after the same step
    assert finish(processes) == [0, 0]
    assert len(read_records(metrics)) < len(whole[0])
    assert finish(start_both("lost")) == [0, 0]
    assert_same(outcome(tmp_path, "lost"), whole)


def causes(records):
    """Why the processes of a run were started again."""
    started = sorted((record["began"], record["cause"]) for record in records if record["kind"] == "goodput")
    return list(dict.fromkeys(cause for _, cause in started))


@pytest.mark.slow
def test_a_run_that_is_killed_and_then_hangs_starts_again_by_itself(tmp_path, start):
    assert start("whole").wait(timeout=300) == 0
    metrics, lines = tmp_path / "alone" / "metrics.jsonl", 0
    process = start("alone", "--restarts", "2", "--hang-timeout", "30")
    for number in (signal.SIGKILL, signal.SIGSTOP):
        wait_for_lines(metrics, lines + 6, process)
        (child,) = children(process)
        os.kill(child, number)
        lines = metrics.read_bytes().count(b"\n")
    assert process.wait(timeout=300) == 0
    run = outcome(tmp_path, "alone")
    assert_same(run, outcome(tmp_path, "whole"))
    first, killed, hung = causes(run[0])
    assert first is None
    assert "was ended by SIGKILL" in killed
    assert "took no step for 30 s" in hung
    assert f"{hung}; starting it again in" in (tmp_path / "alone.log").read_text()


@pytest.mark.slow
def test_two_supervised_processes_come_back_together(tmp_path, start):
    join = ("--coordinator", f"localhost:{free_port()}", "--process-count", "2", "--restarts", "5", "--process-id")
    mesh = {"data": 2, "tensor": 2}
    processes = [start("both", *join, str(number), devices=2, mesh=mesh) for number in (0, 1)]
    wait_for_lines(tmp_path / "both" / "metrics.jsonl", 6, processes[0])
    (child,) = children(processes[1])
    os.kill(child, signal.SIGKILL)
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    records, _ = outcome(tmp_path, "both")
    assert {record["step"] for record in records if record["kind"] == "train"} >= {3 * step for step in range(1, 21)}
    assert len(causes(records)) >= 2
    log = (tmp_path / "both.log").read_text()
    assert "was ended by SIGKILL after step" in log


FEWER = """
import json, os
from pathlib import Path
place = os.environ.get("ZAMBA2_SUPERVISOR")
if place and json.loads((Path(place) / "orders.json").read_text())["cause"]:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
"""
"""What Python runs in every process first; a run that was started again then finds two devices."""


@pytest.mark.slow
def test_a_run_goes_on_by_itself_on_what_devices_are_left(tmp_path, start, monkeypatch):
    meshes = [{"fsdp": 2, "tensor": 2}, {"fsdp": 2}]
    assert start("whole", devices=4, meshes=meshes).wait(timeout=300) == 0
    (tmp_path / "sitecustomize.py").write_text(FEWER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    process = start("alone", "--restarts", "1", devices=4, meshes=meshes)
    wait_for_lines(tmp_path / "alone" / "metrics.jsonl", 9, process)
    (child,) = children(process)
    os.kill(child, signal.SIGKILL)
    assert process.wait(timeout=300) == 0
    said = process.stdout.read()
    before, after = (line for line in said.splitlines() if line.startswith("The mesh is"))
    assert "fsdp=2, tensor=2" in before
    assert "fsdp=2, tensor=1" in after
    whole, alone = (read_records(tmp_path / directory / "metrics.jsonl") for directory in ("whole", "alone"))
    assert ["was ended by SIGKILL" in cause for cause in causes(alone)[1:]] == [True]
    # The same rows; but sums over other devices, of which training makes more at every step.
    np.testing.assert_allclose(losses(alone)[:15], losses(whole)[:15], rtol=1e-5)
    np.testing.assert_allclose(losses(alone), losses(whole), rtol=1e-2)
