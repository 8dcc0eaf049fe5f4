import contextlib
import time

from zamba2_jax.train.goodput import Clock, describe, wall_time
from zamba2_jax.train.metrics import GoodputRecord


def test_all_of_the_time_is_in_one_part(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock()

    def passes(seconds):
        now[0] += seconds

    passes(1)
    with clock.during("steps"):
        passes(2)
        with clock.during("data"):
            passes(4)
        passes(8)
        assert clock.record(step=3, first=1).parts["steps"] == 10
        with contextlib.suppress(OSError), clock.during("checkpoint"):
            passes(16)
            raise OSError
        passes(32)
    passes(64)
    record = clock.record(step=4, first=1, cause="why")
    expected = {"start": 65, "steps": 42, "data": 4, "checkpoint": 16, "compile": 0, "evaluation": 0}
    assert record.parts == expected
    assert (record.seconds, record.step, record.first, record.cause) == (127, 4, 1, "why")


def at(second, first, *spent):
    """The records of a process that began at a second, by step and seconds of its steps and its compilation."""
    began = f"2026-01-01T00:{second // 60:02}:{second % 60:02}.000000+00:00"
    return [
        GoodputRecord(step=step, first=first, began=began, steps=float(steps), compile=float(compiling))
        for step, steps, compiling in spent
    ]


def test_what_no_checkpoint_keeps_is_lost():
    """Of 100 s: one process whose last checkpoint was never complete, one that made none, one that went back, one."""
    records = [
        *at(0, 0, (0, 0, 2), (4, 10, 2), (8, 20, 2)),
        *at(30, 4, (4, 0, 3)),
        *at(40, 4, (4, 0, 3), (8, 11, 3), (12, 21, 3)),
        *at(75, 8, (8, 0, 4), (12, 12, 4), (16, 21, 4)),
    ]
    seconds = wall_time(records[::-1])
    assert (seconds["steps"], seconds["compile"], seconds["lost"]) == (10 + 11 + 21, 2 + 3 + 4, 49)
    assert sum(seconds.values()) == 100
    assert describe(records).startswith("Of 100 s: steps 42.0%, data 0.0%, compile 9.0%")
    assert (wall_time([]), describe([])) == ({}, "")


def test_a_process_that_goes_back_takes_from_all_before_it():
    seconds = wall_time([*at(0, 0, (4, 10, 0), (8, 20, 0)), *at(20, 8, (12, 15, 0)), *at(50, 4, (4, 0, 1))])
    assert (seconds["steps"], seconds["compile"], seconds["lost"]) == (10, 1, 40)
