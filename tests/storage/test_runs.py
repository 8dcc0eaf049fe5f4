"""Runs whose directory is in an object store."""

import json
import os
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from rich.console import Console

from tests.helpers import COMMAND
from tests.storage.s3 import Proxy, free_port, read_only_server
from tests.train.runs import config, numbers, table
from zamba2_jax.checkpoint.hf import load_hf
from zamba2_jax.checkpoint.remote import RemoteCheckpoints
from zamba2_jax.cli.main import main
from zamba2_jax.parallel.hosts import run_mesh
from zamba2_jax.storage.remote import RemoteDirectory
from zamba2_jax.train.directory import look_at_run
from zamba2_jax.train.metrics import read_records
from zamba2_jax.train.run import run
from zamba2_jax.train.step import abstract_state

QUIET = Console(quiet=True)


def outcome(values):
    """Records and last state of a run."""
    like = abstract_state(
        values.model.resolve(), values.optimizer.transformation(), run_mesh(values.mesh), values.dtype
    )
    with look_at_run(values.directory) as place, place.checkpoints(read_only=True) as checkpoints:
        state, _ = checkpoints.restore(checkpoints.steps[-1], like)
        records = read_records(place.directory / "metrics.jsonl")
        return [record for record in records if record["kind"] != "goodput"], jax.device_get(state)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run on this machine comes to."""
    path = tmp_path_factory.mktemp("whole")
    values = config(path, directory=str(path / "run"))
    assert run(values, QUIET)
    return outcome(values)


def assert_same(one, other):
    assert numbers(one[0]) == numbers(other[0])
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_killed_run_goes_on_as_if_it_never_had_been(bucket, tmp_path):
    # All of it in processes of its own: what a process has compiled before can round otherwise.
    def start(name, directory):
        values = table(tmp_path, directory=directory, logging={"every": 3, "health_every": 13})
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
        command = [*COMMAND, "train", "--config", str(tmp_path / f"{name}.json")]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    undisturbed, directory = str(tmp_path / "undisturbed"), f"{bucket}/runs/killed"
    beside, process = start("undisturbed", undisturbed), start("killed", directory)
    remote = RemoteDirectory(directory)
    while process.poll() is None and "checkpoints/4/commit-0-of-1.json" not in remote.sizes():
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert start("killed", directory).wait(300) == 0
    assert beside.wait(300) == 0
    assert_same(*(outcome(config(tmp_path, directory=where)) for where in (directory, undisturbed)))
    top = {name.split("/")[0] for name in remote.sizes()}
    assert top == {
        ".claim.json",
        "architecture.json",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "tokenizer",
    }


def test_what_a_store_refuses_is_said_before_the_first_step(bucket, use, tmp_path, capsys):
    def said(**changes):
        (tmp_path / "run.json").write_text(json.dumps(table(tmp_path, **changes)))
        assert main(["train", "--config", str(tmp_path / "run.json")]) == 2
        return capsys.readouterr().err

    assert "s3://no-such-bucket/run: The specified bucket does not exist" in said(directory="s3://no-such-bucket/run")
    assert "s4://x/run: expected a local path, s3:// or gs://" in said(directory="s4://x/run")
    RemoteDirectory(bucket).write("data/other.txt", b"x")
    assert f"{bucket}/data holds other.txt: expected a new directory" in said(directory=f"{bucket}/data")
    with read_only_server() as port:
        use(port)
        assert f"{bucket}/run/.claim.json: Access Denied" in said(directory=f"{bucket}/run")


def test_an_export_goes_there_and_a_run_on_another_mesh_begins_with_it(bucket, tmp_path, capsys):
    phases = [{"name": "only", "steps": 2, "shares": {"a": 1.0}}]
    first = config(tmp_path, directory=f"{bucket}/first", phases=phases)
    assert run(first, QUIET)
    more = [*phases, {"name": "more", "steps": 1, "shares": {"b": 1.0}}]
    wider = config(tmp_path, directory=f"{bucket}/first", phases=more, mesh={"fsdp": 2})
    assert run(wider, QUIET)
    state = outcome(wider)[1]
    out = f"{bucket}/exports/hf"
    assert main(["export", "--run", f"{bucket}/first", "--output", out]) == 0
    np.testing.assert_array_equal(load_hf(out).embed[...], state.model.embed[...])
    assert main(["export", "--run", f"{bucket}/first", "--output", out]) == 2
    assert "hf is there already: expected a new or an empty directory" in capsys.readouterr().err
    assert main(["export", "--run", f"{bucket}/nothing", "--output", f"{out}-2"]) == 2
    assert f"{bucket}/nothing is not the directory of a run" in capsys.readouterr().err
    further = config(tmp_path, directory=f"{bucket}/further", phases=phases, model={"hf": out}, tokenizer=out)
    assert run(further, QUIET)
    # On one device, the other on two: sums in another order.
    assert outcome(further)[0][0]["loss"] == pytest.approx(outcome(wider)[0][-1]["loss"], rel=1e-6)


def test_a_store_that_goes_away_costs_what_came_after_the_last_checkpoint(
    bucket, whole, server, use, tmp_path, monkeypatch
):
    values = config(tmp_path, directory=f"{bucket}/run", checkpoints={"every": 3})
    remote = RemoteDirectory(values.directory)
    with Proxy(server) as proxy:
        use(proxy.port)
        upload = RemoteDirectory.upload

        def upload_some(self, files):
            if self.url.endswith("checkpoints/6"):
                proxy.limit = proxy.passed + 20_000  # in the middle of the second checkpoint
            upload(self, files)

        with monkeypatch.context() as during:
            during.setattr(RemoteDirectory, "upload", upload_some)
            with pytest.raises(
                OSError,
                match=rf"a checkpoint could not be written: {remote}/.*; the last checkpoint is "
                rf"{remote}/checkpoints/3",
            ):
                run(values, QUIET)
    use(server)
    assert RemoteDirectory(f"{values.directory}/checkpoints/6").sizes()
    assert run(values, QUIET)
    assert_same(outcome(values), whole)


def test_a_slow_store_does_not_slow_steps(bucket, server, use, tmp_path, monkeypatch):
    publish, took = RemoteCheckpoints._publish, []

    def timed(self, step):
        begin = time.perf_counter()
        publish(self, step)
        took.append(time.perf_counter() - begin)

    monkeypatch.setattr(RemoteCheckpoints, "_publish", timed)
    values = config(tmp_path, directory=f"{bucket}/run", checkpoints={"every": 7})
    with Proxy(server) as proxy:
        use(proxy.port)
        proxy.seconds = 0.3
        assert run(values, QUIET)
    use(server)
    records = [record for record in outcome(values)[0] if record["kind"] == "train"]
    after = sum(record["seconds"] for record in records if record["step"] > 7)
    assert took[0] > 2  # seconds, in which the six steps after the checkpoint are done
    assert after < took[0] / 2


@pytest.mark.slow
def test_two_processes_that_share_nothing_make_one_run(bucket, tmp_path):
    mesh = {"fsdp": 2, "tensor": 2}
    phases = [{"name": name, "steps": 4, "shares": {"a": 1.0}} for name in ("first", "second")]

    def start(number, port, **changes):
        path = tmp_path / f"run-{number}.json"
        path.write_text(json.dumps(table(tmp_path, directory=f"{bucket}/run", mesh=mesh, **changes)))
        join = ["--coordinator", f"localhost:{port}", "--process-count", "2", "--process-id", str(number)]
        environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        return subprocess.Popen(
            [*COMMAND, "train", "--config", str(path), *join], env=environment, stdout=subprocess.DEVNULL
        )

    for parts in (phases[:1], phases):  # the second time they begin with what both wrote
        port = free_port()
        assert [process.wait(timeout=300) for process in [start(n, port, phases=parts) for n in (0, 1)]] == [0, 0]
    names = RemoteDirectory(f"{bucket}/run/checkpoints/8").sizes()
    assert {"commit-0-of-2.json", "commit-1-of-2.json"} < set(names)
    alone = config(tmp_path, directory=str(tmp_path / "alone"), mesh=mesh, phases=phases)
    assert run(alone, QUIET)
    # The sums of two processes are taken in another order, over 8 steps.
    (records, state), (records_alone, state_alone) = (
        outcome(config(tmp_path, directory=directory, phases=phases))
        for directory in (f"{bucket}/run", alone.directory)
    )
    assert records[-1]["loss"] == pytest.approx(records_alone[-1]["loss"], rel=1e-5)
    for a, b in zip(jax.tree.leaves(state.model), jax.tree.leaves(state_alone.model), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
