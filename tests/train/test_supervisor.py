"""Of processes that do what runs do, and of nothing but that; runs themselves are in test_run_processes.py."""

import json
import signal
import subprocess
import sys
import textwrap

import pytest

from zamba2_jax.cli.main import main
from zamba2_jax.train import supervisor
from zamba2_jax.train.supervisor import Policy, supervise

BEGIN = """
import json, os, signal, sys, time
from pathlib import Path
from zamba2_jax.train.supervisor import Lifeline
lifeline, log = Lifeline.from_environment(), Path(sys.argv[1])
orders = lifeline.orders
with log.open("a") as file:
    file.write(json.dumps([orders.cause, orders.before, orders.skip_to]) + "\\n")
number = len(log.read_text().splitlines())
"""


@pytest.fixture
def process(tmp_path):
    """The command of a process that does something, by the `number` of the start, and the orders of all starts."""

    def make(code):
        words = [sys.executable, "-c", BEGIN + textwrap.dedent(code), str(tmp_path / "log")]
        return words, lambda: [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]

    return make


@pytest.fixture
def pauses(monkeypatch):
    """The seconds of the pauses before restarts, which are not made."""
    made = []
    monkeypatch.setattr(supervisor._Signals, "sleep", lambda self, seconds: made.append(seconds))
    return made


def test_a_process_is_started_again_while_it_gets_further(process, pauses):
    """Steps 3, then 7, are reached; then no step is new."""
    words, orders = process("""
        steps = [3, 7, 7, 5][number - 1] if number < 5 else None
        if steps is not None:
            lifeline.took(steps)
        if number < 3:
            os.kill(os.getpid(), signal.SIGKILL)
        sys.exit(9)
    """)
    said = []
    assert supervise(words, Policy(restarts=3), said.append) == 9
    killed = "the process of the run was ended by SIGKILL after step"
    ended = "the process of the run ended with exit code 9"
    causes = [f"{killed} 3", f"{killed} 7", f"{ended} after step 7", f"{ended} after step 5"]
    assert orders() == [[cause, None, None] for cause in [None, *causes]]
    assert pauses == [1, 1, 2, 4]
    assert said[1] == f"{causes[1]}; starting it again in 1 s (1 of 3 without a new step)"
    assert said[-1] == f"{ended} before its first step; giving up after 3 restarts in a row without a new step"


def test_bad_input_and_success_are_the_end(process, pauses):
    words, orders = process("sys.exit(2 if number == 1 else 0)")
    for code in (2, 0):
        assert supervise(words, Policy(restarts=3), print) == code
    assert (len(orders()), pauses) == (2, [])


def test_a_process_that_hangs_says_where_and_is_started_again(process, pauses, monkeypatch, capfd):
    words, orders = process("""
        def hanging():
            time.sleep(60)
        time.sleep(1.0)  # no step yet, and so no hang
        lifeline.took(number)
        if number == 1:
            hanging()
        if number == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
    """)
    monkeypatch.setattr(supervisor, "_GRACE", 1.0)
    assert supervise(words, Policy(restarts=1, hang_timeout=0.6), lambda text: None) == 0
    assert [cause for cause, *_ in orders()] == [
        None,
        "the run took no step for 0.6 s after step 1, and was killed",
        "the run took no step for 0.6 s after step 2, and was killed",
    ]
    assert "in hanging" in capfd.readouterr().err


@pytest.mark.parametrize(("skip", "code", "starts"), [(False, 1, 1), (True, 0, 4)])
def test_a_run_that_diverged_goes_on_only_if_it_may(process, pauses, skip, code, starts):
    """The batches that are left out stay so after another loss; the checkpoints are deleted once."""
    words, orders = process("""
        lifeline.took(10 * number)
        if number in (1, 3):
            lifeline.diverged(10 * number - 2, "first", 10 * number + 5)
            sys.exit(1)
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert supervise(words, Policy(restarts=1, skip_diverged=skip), print) == code
    expected = [[None, None], [8, ["first", 15]], [None, ["first", 15]], [28, ["first", 35]]]
    assert [rest for _, *rest in orders()] == expected[:starts]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_signals_go_to_the_process_and_end_all(process, number, code):
    words, orders = process("""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
        print(flush=True)
        time.sleep(60)
    """)
    parent = (
        "import sys; from zamba2_jax.train.supervisor import Policy, supervise; "
        "sys.exit(supervise(sys.argv[1:], Policy(restarts=3), print))"
    )
    with subprocess.Popen([sys.executable, "-c", parent, *words], stdout=subprocess.PIPE, text=True) as running:
        running.stdout.readline()
        running.send_signal(number)
        assert running.wait(30) == code
    assert len(orders()) == 1


def test_the_supervisor_loads_no_jax():
    code = "import sys, zamba2_jax.train.supervisor, zamba2_jax.cli.train; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--restarts", "0"], "--restarts 0: expected at least 1"),
        (["--restarts", "1", "--hang-timeout", "0"], "--hang-timeout 0.0: expected seconds > 0"),
        (["--hang-timeout", "9"], "are about restarts: expected --restarts with them"),
        (["--skip-diverged"], "are about restarts: expected --restarts with them"),
    ],
)
def test_wrong_options_are_named(tmp_path, capsys, words, message):
    assert main(["train", "--config", str(tmp_path / "run.toml"), *words]) == 2
    assert message in capsys.readouterr().err
