"""Where the wall time of a run goes, over all the processes that have run it one after the other."""

import contextlib
import datetime
import time
from collections.abc import Iterator, Sequence

from zamba2_jax.train.metrics import PARTS, GoodputRecord, Part

LOST = "lost"
"""The time of a run that is in no `Part`: from the checkpoint that a process went on from to the beginning of that
process. It holds steps that are taken again, the time to start, and pauses that someone has made."""


class Clock:
    """Divides the wall time of a process among the `Part`s; all of it is in one of them."""

    def __init__(self) -> None:
        self._began = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        self._since = time.perf_counter()
        self._part: Part = "start"
        self._seconds: dict[Part, float] = {}

    @contextlib.contextmanager
    def during(self, part: Part) -> Iterator[None]:
        """What happens within is of this part; a part within another interrupts that one."""
        outer = self._part
        self._switch(part)
        try:
            yield
        finally:
            self._switch(outer)

    def record(self, *, step: int, first: int, cause: str | None = None) -> GoodputRecord:
        """What the process has taken up to now; arguments as in `GoodputRecord`."""
        self._switch(self._part)
        return GoodputRecord(step=step, first=first, began=self._began, cause=cause, **self._seconds)

    def _switch(self, part: Part) -> None:
        now = time.perf_counter()
        self._seconds[self._part] = self._seconds.get(self._part, 0.0) + now - self._since
        self._since, self._part = now, part


def wall_time(records: Sequence[GoodputRecord]) -> dict[str, float]:
    """Seconds of a run by `Part`, and what was `LOST`; nothing where there are no records.

    Of each process but the last that counts which led up to a checkpoint that a later one went on from.

    Args:
        records: of a run, in any order.
    """
    processes: dict[str, list[GoodputRecord]] = {}
    for record in sorted(records, key=lambda record: (record.began, record.step, record.seconds)):
        processes.setdefault(record.began, []).append(record)
    if not processes:
        return {}
    *before, last = processes.values()
    kept, bound = [last[-1]], last[0].first
    for own in reversed(before):
        kept += [record for record in own if record.first < record.step <= bound][-1:]
        bound = min(bound, own[0].first)
    seconds: dict[str, float] = {part: sum(record.parts[part] for record in kept) for part in PARTS}
    began, end = (datetime.datetime.fromisoformat(text) for text in (min(processes), max(processes)))
    total = (end - began).total_seconds() + last[-1].seconds
    return {**seconds, LOST: max(0.0, total - sum(seconds.values()))}


def describe(records: Sequence[GoodputRecord]) -> str:
    """The shares of the wall time of a run on a line; empty where there are no records."""
    seconds = wall_time(records)
    total = sum(seconds.values())
    if not total:
        return ""
    shares = ", ".join(f"{part} {value / total:.1%}" for part, value in seconds.items())
    return f"Of {total:,.0f} s: {shares}"
