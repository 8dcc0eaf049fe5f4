"""Starts the process of a run again when it is lost, hangs, or has diverged.

The supervisor is the parent of that process, one on each host of a run with several. It does not import JAX, which
would take the devices. The two talk by files in a directory of this machine, which the environment variable `VARIABLE`
names.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

VARIABLE = "ZAMBA2_SUPERVISOR"
LONGEST_PAUSE = 60.0
"""Seconds before a restart at most; before the first it is 1, and it doubles with each that comes to no new step."""
_BAD_INPUT = 2  # the exit code of `cli.main` for it
_GRACE = 5.0  # seconds that a process has to say where it hangs
_POLL = 0.1
_ORDERS, _STEP, _DIVERGED = "orders.json", "step", "diverged.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Orders:
    """What a process of a run is to do.

    Attributes:
        cause: why it was started again; None at first.
        before: it goes on from the last checkpoint before this step, and deletes the others; None keeps all.
        skip_to: a phase and a batch of it up to which none is to be taken any more; see `loop.train`.
    """

    cause: str | None = None
    before: int | None = None
    skip_to: tuple[str, int] | None = None


class Lifeline:
    """What a process of a run tells its supervisor, and is told by it; without a supervisor it does nothing."""

    def __init__(self, directory: Path | None = None):
        """With a supervisor that listens in `directory`."""
        self._directory = directory
        self.orders = Orders() if directory is None else _read_orders(directory / _ORDERS)

    @classmethod
    def from_environment(cls) -> "Lifeline":
        """Of this process."""
        return cls(Path(os.environ[VARIABLE]) if VARIABLE in os.environ else None)

    def took(self, step: int) -> None:
        """Says that the run has taken so many steps."""
        if self._directory is not None:
            file = os.open(self._directory / _STEP, os.O_WRONLY | os.O_CREAT, 0o600)
            os.write(file, b"%20d" % step)  # over the last one: a process may be killed at any moment
            os.close(file)

    def diverged(self, step: int, phase: str, batch: int) -> None:
        """Says where the run diverged; arguments as in `loop.DivergedError`."""
        if self._directory is not None:
            (self._directory / _DIVERGED).write_text(json.dumps([step, phase, batch]))


def _read_orders(path: Path) -> Orders:
    table = json.loads(path.read_text())
    return Orders(**{**table, "skip_to": table["skip_to"] and tuple(table["skip_to"])})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """When to start a process again.

    Attributes:
        restarts: how many times in a row without a step that is new to the run, at least 1.
        hang_timeout: seconds without a step, from the first of the process on, after which it is killed; None for
            never.
        skip_diverged: whether a run that has diverged goes on from before that, without the batches up to there.

    Raises:
        ValueError: a value is out of its range.
    """

    restarts: int
    hang_timeout: float | None = None
    skip_diverged: bool = False

    def __post_init__(self) -> None:
        if self.restarts < 1:
            raise ValueError(f"--restarts {self.restarts}: expected at least 1")
        if self.hang_timeout is not None and not self.hang_timeout > 0:
            raise ValueError(f"--hang-timeout {self.hang_timeout}: expected seconds > 0")


class _End(NamedTuple):
    """How a process ended: its exit code, its last step if it took any, whether it hung, where it diverged."""

    code: int
    step: int | None
    hung: bool
    diverged: tuple[int, str, int] | None


def supervise(command: Sequence[str], policy: Policy, say: Callable[[str], object]) -> int:
    """Runs a command that trains until it is done, starting it again as `policy` says.

    SIGINT, SIGTERM and SIGHUP are passed on; after one of them nothing is started again. Nor is a process that ends
    with the code for bad input before its first step.

    Args:
        command: the words of the process; its environment is that of this one, with `VARIABLE`.
        policy: when to start it again.
        say: is told of each restart, and of giving up.

    Returns:
        The exit code of the last process; of one that a signal has ended, 128 and its number.

    Raises:
        OSError: the command cannot be started.
    """
    in_a_row, furthest, orders = 0, 0, Orders()
    with tempfile.TemporaryDirectory(prefix="zamba2-jax-") as name, _Signals() as signals:
        while True:
            end = _run_once(command, Path(name), orders, policy.hang_timeout, signals)
            code = end.code if end.code >= 0 else 128 - end.code
            bad_input = end.code == _BAD_INPUT and end.step is None
            final = end.diverged is not None and not policy.skip_diverged
            if end.code == 0 or signals.received or bad_input or final:
                return code
            in_a_row = in_a_row + 1 if (end.step or 0) <= furthest else 1
            furthest = max(furthest, end.step or 0)
            cause = _cause(end, policy)
            if in_a_row > policy.restarts:
                say(f"{cause}; giving up after {policy.restarts} restarts in a row without a new step")
                return code
            pause = min(LONGEST_PAUSE, 2.0 ** (in_a_row - 1))
            say(f"{cause}; starting it again in {pause:g} s ({in_a_row} of {policy.restarts} without a new step)")
            signals.sleep(pause)
            if signals.received:
                return code
            orders = _next_orders(orders, end, cause)


def _next_orders(orders: Orders, end: _End, cause: str) -> Orders:
    if end.diverged is None:
        return Orders(cause=cause, skip_to=orders.skip_to)
    step, phase, batch = end.diverged
    return Orders(cause=cause, before=step, skip_to=(phase, batch))


def _cause(end: _End, policy: Policy) -> str:
    after = "before its first step" if end.step is None else f"after step {end.step}"
    if end.hung:
        return f"the run took no step for {policy.hang_timeout:g} s {after}, and was killed"
    if end.diverged is not None:
        step, phase, batch = end.diverged
        return f"the run diverged at step {step}; it goes on from before that, after batch {batch} of phase {phase!r}"
    if end.code < 0:
        return f"the process of the run was ended by {signal.Signals(-end.code).name} {after}"
    return f"the process of the run ended with exit code {end.code} {after}"


def _run_once(
    command: Sequence[str], directory: Path, orders: Orders, hang_timeout: float | None, signals: "_Signals"
) -> _End:
    """Runs a process to its end."""
    for name in (_STEP, _DIVERGED):
        (directory / name).unlink(missing_ok=True)
    (directory / _ORDERS).write_text(json.dumps(dataclasses.asdict(orders)))
    # The process says where it hangs when it is aborted. In a session of its own it has Ctrl-C from here only, once.
    environment = {**os.environ, VARIABLE: str(directory), "PYTHONFAULTHANDLER": "1"}
    hung, seen, since = False, None, time.monotonic()
    with signals.passed_on_to(subprocess.Popen(command, env=environment, start_new_session=True)) as process:
        while process.poll() is None:
            if (written := _written(directory / _STEP)) != seen:
                seen, since = written, time.monotonic()
            if hang_timeout is not None and seen is not None and time.monotonic() - since > hang_timeout:
                hung = True
                _abort(process)
            time.sleep(_POLL)
    step, diverged = (_read(directory / name) for name in (_STEP, _DIVERGED))
    return _End(process.returncode, step, hung, diverged)


def _read(path: Path) -> Any:
    """What a process has written; None if it has not, or was killed meanwhile."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads(path.read_text())
    return None


def _written(path: Path) -> int | None:
    """What changes whenever a file is written; None if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _abort(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGABRT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)
    process.kill()
    process.wait()


class _Signals:
    """Passes on to a process the signals that end a run; a context manager.

    Attributes:
        received: whether there was one.
    """

    def __init__(self) -> None:
        self.received = False
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "_Signals":
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def passed_on_to(self, process: "subprocess.Popen[bytes]") -> Iterator["subprocess.Popen[bytes]"]:
        """Meanwhile they go to this process, which is killed if this one fails."""
        self._process = process
        try:
            if self.received:
                process.terminate()
            yield process
        finally:
            self._process = None
            if process.poll() is None:
                process.kill()
                process.wait()

    def sleep(self, seconds: float) -> None:
        """Returns after so long, or when a signal is received."""
        end = time.monotonic() + seconds
        while not self.received and time.monotonic() < end:
            time.sleep(min(_POLL, seconds))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if self._process is not None:
            self._process.send_signal(number)
