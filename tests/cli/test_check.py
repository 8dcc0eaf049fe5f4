"""`zamba2 check` on a CPU, and what it finds where a kernel, a training step or a step of generation is wrong."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from zamba2_jax import preset
from zamba2_jax.check import models, ops, run
from zamba2_jax.check.models import shallow
from zamba2_jax.check.ops import small_cases
from zamba2_jax.cli.main import main


@pytest.fixture
def one_device(monkeypatch):
    """Of the eight that the tests have; over all of them compiling takes longer."""
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)


def test_checks_everything_on_a_cpu(one_device, tmp_path, capsys):
    path = tmp_path / "check.json"
    assert main(["check", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("All right: the defaults are what to use.")
    found = json.loads(path.read_text())
    rows = {(row["subject"]["name"], row["implementation"]) for row in found["rows"]}
    assert rows == {
        *(("scan", name) for name in ("xla", "pallas_tpu", "pallas_gpu")),
        *(("attention", name) for name in ("xla", "splash")),
        *(("step", name) for name in ("xla", "pallas_gpu")),
        *((name, "xla") for name in ("cached attention", "selective scan", "training step", "prefill and steps")),
    }
    for row in found["rows"]:
        assert row["verdict"] == "right"
        assert 0 < row["error"] < row["allowed"]
        assert (row["seconds"] is None) == row["interpreted"]
        assert row["subject"]["name"].split()[0] in printed


def test_a_wrong_kernel_is_found_and_what_to_set_is_said(monkeypatch, capsys):
    """One that forgets a hundredth of dt D x."""
    right = ops.ssd_pallas_tpu

    def wrong(*, D, **others):
        return right(D=0.99 * D, **others)

    scan = small_cases("cpu")["scan in float32"]
    monkeypatch.setattr(ops, "ssd_pallas_tpu", wrong)
    monkeypatch.setattr(run, "checks", lambda model: {"scan": partial(run._check_op, scan)})
    assert main(["check", "--quick"]) == 1
    *table, last = capsys.readouterr().out.splitlines()
    assert sum("wrong" in line for line in table) == 1
    assert last.startswith("Use instead: zamba2 train --set step.scan=xla; ")


def test_a_wrong_training_step_is_found(one_device, monkeypatch):
    """One to which all documents of a row are one."""
    right = models.compile_train_step

    def wrong(*arguments, **options):
        step = right(*arguments, **options)
        return lambda state, batch: step(state, batch.replace(segment_ids=jnp.ones_like(batch.segment_ids)))

    monkeypatch.setattr(models, "compile_train_step", wrong)
    [found] = models.check_training_step("tiny", shallow(preset("zamba2-tiny")), "float32")
    assert (found.verdict, found.implementation) == ("wrong", "xla")
    assert run.advice([found]).startswith("Plain XLA itself is wrong here (training step)")


def test_wrong_steps_are_found(monkeypatch):
    """Which take in the token before."""
    right, given = models.decode_step, [jnp.zeros(1, jnp.int32)]

    def wrong(model, token, cache, **options):
        given.append(token)
        return right(model, given[-2], cache, **options)

    monkeypatch.setattr(models, "decode_step", wrong)
    [found] = models.check_generation("tiny", shallow(preset("zamba2-tiny")), "float32")
    assert (found.verdict, found.result) == ("wrong", "steps")


def test_options_that_exclude_each_other_are_named(capsys):
    assert main(["check", "--quick", "--preset", "zamba2-1.2b"]) == 2
    assert "--quick and --preset exclude each other" in capsys.readouterr().err
    assert main(["check", "--preset", "zamba3"]) == 2
    assert "preset 'zamba3' is unknown" in capsys.readouterr().err
    assert main(["check", "--json", "nowhere/at/all"]) == 2
    assert "there is no directory" in capsys.readouterr().err


def test_one_of_several_processes_joins_the_others_first(monkeypatch):
    order = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda: order.append("joined"))
    monkeypatch.setattr(run, "this_platform", lambda: order.append("asked") or "cpu")
    monkeypatch.setattr(run, "checks", lambda model: {})
    assert main(["check", "--distributed"]) == 0
    assert order == ["joined", "asked"]
