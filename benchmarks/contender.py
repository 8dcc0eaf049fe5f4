"""Processes that answer the same questions in turns, so that a busy machine slows all sides of a comparison."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """What was answered, in how many seconds, and the peak of the process's resident memory meanwhile, in bytes."""

    value: Any
    seconds: float
    memory: int


class Contender:
    """A process of its own. `make(name, *arguments)`, called there, gives the function that answers."""

    def __init__(self, name: str, make: Callable[..., Callable[..., Any]], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, make, name, *arguments), daemon=True)
        self._process.start()
        self.name = name

    def __call__(self, *question: Any) -> Answer:
        """Its answer to the arguments."""
        self._pipe.send(question)
        return self._pipe.recv()

    def close(self) -> None:
        """Ends the process."""
        self._pipe.send(None)
        self._process.join()


def _work(pipe: Connection, make: Callable[..., Callable[..., Any]], *arguments: Any) -> None:
    answer = make(*arguments)
    while (question := pipe.recv()) is not None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory counts from here
        start = time.perf_counter()
        value = answer(*question)
        pipe.send(Answer(value, time.perf_counter() - start, _peak_memory()))


def _peak_memory() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
