"""What counts as wrong and as slow, and what is then to be set."""

import jax.numpy as jnp
import numpy as np
import pytest

from zamba2_jax.check import run
from zamba2_jax.check.compare import Case, Implementation, Subject, check_case, findings, on_host
from zamba2_jax.check.run import advice, is_wrong
from zamba2_jax.ops.backend import Backend

SCAN = Subject("scan", "t=3", "bfloat16", "scan", real=True)
ERRORS = {"y": 1e-3, "dx": 2e-3}


def verdicts(measured, times, subject=SCAN):
    return {finding.implementation: finding.verdict for finding in findings(subject, measured, times)}


def test_an_error_is_wrong_beyond_four_times_that_of_xla():
    floor = 2**-6
    for error, verdict in ((4 * 2e-3 + floor - 1e-6, "right"), (4 * 2e-3 + floor + 1e-6, "wrong"), (np.inf, "wrong")):
        assert verdicts({"xla": ERRORS, "kernel": {"y": 0.0, "dx": error}}, {})["kernel"] == verdict
    assert verdicts({"xla": {"y": 1e-3, "dx": 3e-2}}, {}) == {"xla": "wrong"}
    # An XLA that is wrong lets no kernel be as wrong as it is.
    assert verdicts({"xla": {"y": 1.0}, "kernel": {"y": 1.0}}, {}) == {"xla": "wrong", "kernel": "wrong"}


def test_the_result_that_is_nearest_to_its_limit_is_shown():
    [_, kernel] = findings(SCAN, {"xla": {"y": 1e-2, "dx": 1e-4}, "kernel": {"y": 2e-2, "dx": 1.5e-2}}, {})
    assert (kernel.result, kernel.error) == ("dx", 1.5e-2)
    assert kernel.allowed == pytest.approx(4e-4 + 2**-6)


def test_times_count_at_real_sizes_alone():
    measured, times = {"xla": ERRORS, "kernel": ERRORS}, {"xla": 1.0, "kernel": 1.2}
    assert verdicts(measured, times) == {"xla": "right", "kernel": "slow"}
    assert verdicts(measured, times | {"kernel": 1.05})["kernel"] == "right"
    assert verdicts(measured, times, Subject("scan", "t=3", "bfloat16", "scan"))["kernel"] == "right"


def test_what_does_not_run_is_a_finding():
    def fails(inputs):
        raise NotImplementedError("no such instruction")

    def double(inputs):
        return {"y": 2 * inputs["x"]}

    case = Case(
        Subject("scan", "t=3", "float32", "scan"),
        {"x": jnp.arange(3.0)},
        double,
        {"xla": Implementation(double), "pallas_tpu": Implementation(fails)},
    )
    xla, failed = check_case(case)
    assert (xla.verdict, xla.error) == ("right", 0)
    assert xla.seconds > 0
    assert (failed.verdict, failed.message) == ("failed", "NotImplementedError: no such instruction")
    assert is_wrong(failed)
    assert "--set step.scan=xla;" in advice([xla, failed])


def test_the_host_computes_in_float64():
    [third] = on_host(lambda x: [x / 3], jnp.ones((), jnp.bfloat16))
    assert third == np.float64(1) / 3


def test_advice_names_what_is_wrong_and_what_is_slow_and_used(monkeypatch):
    slow = findings(SCAN, {"xla": ERRORS, "pallas_tpu": ERRORS}, {"xla": 1.0, "pallas_tpu": 2.0})
    step = Subject("step", "b=1", "bfloat16", "step")
    wrong = findings(step, {"xla": ERRORS, "pallas_gpu": {"y": 1.0, "dx": 0.0}}, {})
    model = Subject("training step", "zamba2-tiny", "bfloat16")
    whole = findings(model, {"xla": ERRORS, "default": {"y": 1.0, "dx": 0.0}}, {})
    assert advice(slow).startswith("All right")  # on a CPU the kernel is not what runs
    in_python = "in Python backend=dataclasses.replace(default_backend(dtype), "
    assert advice(wrong) == f'Use instead: {in_python}step="xla")'
    monkeypatch.setattr(run, "default_backend", lambda dtype: Backend(scan="pallas_tpu", attention="splash"))
    assert advice(slow) == f'Use instead: zamba2 train --set step.scan=xla; {in_python}scan="xla")'
    assert "--set step.scan=xla step.attention=xla;" in advice(slow + whole)
    plain = findings(SCAN, {"xla": {"y": 1.0}}, {})
    assert advice(plain + slow).startswith("Plain XLA itself is wrong here (scan)")
