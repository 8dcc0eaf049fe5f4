"""The training loop: all the input and output around the pure step."""

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import grain
import jax

from zamba2_jax.train.data import Batch, batches
from zamba2_jax.train.documents import Documents
from zamba2_jax.train.metrics import EvalRecord, Report, TrainRecord
from zamba2_jax.train.schedule import Phase
from zamba2_jax.train.step import StepMetrics, TrainState, TrainStep, evaluate


class Stage(NamedTuple):
    """A phase and its data.

    Attributes:
        phase: the plan.
        batches: of which it takes the first `phase.steps`.
    """

    phase: Phase
    batches: grain.IterDataset[Batch]


def make_stages(
    phases: Sequence[Phase],
    sources: Mapping[str, Documents],
    *,
    batch_size: int,
    length: int,
    seed: int,
) -> list[Stage]:
    """The phases with batches of `batch_size` rows of `length` tokens from the sources' documents.

    Every phase shuffles its sources anew.

    Raises:
        ValueError: as `batches`.
    """
    return [
        Stage(phase, batches(sources, phase.shares, batch_size=batch_size, length=length, seed=(seed, number)))
        for number, phase in enumerate(phases)
    ]


def train(
    state: TrainState,
    step: TrainStep,
    stages: Sequence[Stage],
    *,
    held_out: Mapping[str, Sequence[Batch]],
    log_every: int,
    eval_every: int,
    report: Report,
) -> TrainState:
    """Runs the stages one after the other, from where `state` stands.

    A run that starts from a state saved on the way sees the batches, and so takes the steps, of one that never
    stopped.

    Args:
        state: its buffers are taken over.
        step: one training step.
        stages: the run.
        held_out: named batches, evaluated before the first step, every `eval_every` steps and at the end of a phase.
        log_every: steps per training record; an evaluation ends a record too.
        eval_every: steps between evaluations, counted within a phase.
        report: is given every record.

    Raises:
        ValueError: an interval is below 1.
    """
    for name, value in (("log_every", log_every), ("eval_every", eval_every)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected an integer >= 1")
    taken, first = int(state.step), 0
    if not taken:
        _evaluate(state, stages[0].phase, 0, held_out, report)
    for phase, stream in stages:
        stretch: list[StepMetrics] = []
        begin = time.perf_counter()
        done_before = max(taken - first, 0)
        for done, batch in enumerate(_between(stream, done_before, phase.steps), done_before + 1):
            state, metrics = step(state, batch)
            stretch.append(metrics)
            due = done % eval_every == 0 or done == phase.steps
            if due or done % log_every == 0:
                report(_summarize(phase, first + done, jax.device_get(stretch), begin))
                if due:
                    _evaluate(state, phase, first + done, held_out, report)
                stretch, begin = [], time.perf_counter()
        first += phase.steps
    return state


def _between(stream: grain.IterDataset[Batch], first: int, stop: int) -> Iterator[Batch]:
    """The batches with numbers from `first` up to `stop`, exclusive."""
    iterator = iter(stream)
    grain.experimental.set_next_index(iterator, first)
    with contextlib.closing(iterator):
        yield from itertools.islice(iterator, max(stop - first, 0))


def _evaluate(
    state: TrainState, phase: Phase, step: int, held_out: Mapping[str, Sequence[Batch]], report: Report
) -> None:
    for name, rows in held_out.items():
        report(EvalRecord(phase=phase.name, step=step, held_out=name, loss=evaluate(state.model, rows)))


def _summarize(phase: Phase, step: int, stretch: Sequence[StepMetrics], begin: float) -> TrainRecord:
    finite = [float(metrics.loss) for metrics in stretch if math.isfinite(metrics.loss)]
    return TrainRecord(
        phase=phase.name,
        step=step,
        loss=sum(finite) / len(finite) if finite else math.nan,
        grad_norm=float(stretch[-1].grad_norm),
        learning_rate=float(stretch[-1].learning_rate),
        tokens=sum(int(metrics.tokens) for metrics in stretch),
        seconds=time.perf_counter() - begin,
        skipped=int(stretch[-1].skipped),
    )
