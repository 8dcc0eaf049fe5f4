"""The training loop: all the input and output around the pure step."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp

from zamba2_jax.data.batches import Batch, Source, batches
from zamba2_jax.train.goodput import Clock
from zamba2_jax.train.health import health_record
from zamba2_jax.train.metrics import EvalRecord, HealthRecord, Report, TrainRecord
from zamba2_jax.train.schedule import Phase, boundaries
from zamba2_jax.train.step import DEFAULT, StepConfig, StepMetrics, TrainState, TrainStep, evaluate


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
    sources: Mapping[str, Source],
    *,
    batch_size: int,
    length: int,
    seed: int,
    share: tuple[int, int] = (0, 1),
    vocab_size: int | None = None,
) -> list[Stage]:
    """The phases with batches of `batch_size` rows of `length` tokens from the sources.

    Every phase shuffles its sources anew. Of every batch the stages give the part `share`: its index, and of how many.
    A token outside of a vocabulary of `vocab_size` is an error when its row is made.

    Raises:
        ValueError: as `batches`.
    """
    make = partial(
        batches,
        sources,
        batch_size=batch_size,
        length=length,
        host_index=share[0],
        host_count=share[1],
        vocab_size=vocab_size,
    )
    return [Stage(phase, make(phase.shares, seed=(seed, number))) for number, phase in enumerate(phases)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands, beside its `TrainState`; `dataclasses.asdict` of it is for JSON.

    Attributes:
        stage: number of the stage.
        done: steps taken in it.
        data: state of its stream of batches.
        unreported: the steps that no record covers yet, the values of `StepMetrics` of each.
        seconds, waited: what they took; see `TrainRecord`.
        bad: how many of the last steps, without a gap, were skipped, up to the last record.
        left_out: batches of the stage that no step has taken.
    """

    stage: int
    done: int
    data: dict[str, Any]
    unreported: list[list[float]]
    seconds: float
    waited: float
    bad: int
    left_out: int = 0


class DivergedError(RuntimeError):
    """Too many steps in a row had a loss or a gradient that was not finite.

    Attributes:
        step: the first of them.
        phase: of the last of them.
        batch: what the last of them took, counted from 1 over the batches of the phase.
    """

    def __init__(self, message: str, *, step: int, phase: str, batch: int):
        super().__init__(message)
        self.step, self.phase, self.batch = step, phase, batch


AfterStep = Callable[[TrainState, int, Callable[[], Position]], bool]
"""Is given the state, the number of steps taken in all, and what tells the position, for which it waits for the last
step; returns whether to stop."""


def train(
    state: TrainState,
    step: TrainStep,
    stages: Sequence[Stage],
    *,
    held_out: Mapping[str, Sequence[Batch]],
    log_every: int,
    eval_every: int,
    report: Report,
    health_every: int | None = None,
    start: Position | None = None,
    after_step: AfterStep = lambda state, taken, position: False,
    max_skipped: float = math.inf,
    step_config: StepConfig = DEFAULT,
    clock: Clock | None = None,
    skip_to: tuple[str, int] | None = None,
) -> TrainState:
    """Runs the stages one after the other.

    A run that starts from a state and a position told on the way takes the steps, and gives the records but for their
    times, of one that never stopped.

    Args:
        state: its buffers are taken over.
        step: one training step.
        stages: the run.
        held_out: named batches, evaluated before the first step, every `eval_every` steps and at the end of a phase.
        log_every: steps per training record; an evaluation ends a record too.
        eval_every: steps between evaluations, counted within a phase.
        report: is given every record.
        health_every: steps between measurements of health, counted from the start of the run, as `step` was made for;
            each ends a training record too. None where it measures none.
        start: where `state` stands; before the first step by default.
        after_step: is called after every step and its records.
        max_skipped: steps skipped in a row, seen when a record is made, that end the run.
        step_config: how evaluations are computed.
        clock: is told of the time that goes into data and evaluation, not into steps.
        skip_to: a phase, and the batch, counted from 1 over those of the phase, up to which none is taken any more. The
            phase has as many steps as ever, and takes batches that come later.

    Returns:
        The state after the last step, or after that at which `after_step` stopped the run.

    Raises:
        ValueError: an interval is below 1, or `step` does not measure health.
        DivergedError: `max_skipped` steps in a row were skipped.
    """
    intervals = {"log_every": log_every, "eval_every": eval_every, "health_every": health_every}
    for name, value in intervals.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: expected an integer >= 1")
    clock = clock or Clock()
    if start is None:
        with clock.during("evaluation"):
            _evaluate(state, stages[0].phase, 0, held_out, report, step_config)
    log, ends = _Log(start), boundaries([stage.phase for stage in stages])
    for number, ((phase, stream), end) in enumerate(zip(stages, ends, strict=True)):
        first, done = end - phase.steps, _done_in(start, number, phase)
        with contextlib.closing(iter(stream)) as data:
            log.first, log.left_out = first, 0
            if start is not None and start.stage == number:
                data.set_state(start.data)
                log.left_out = start.left_out
            if skip_to is not None and skip_to[0] == phase.name:
                with clock.during("data"):
                    log.leave_out(data, skip_to[1] - done)
            while done < phase.steps:
                with clock.during("data"):
                    batch = log.next_batch(data)
                state, metrics = step(state, batch)
                log.metrics.append(dataclasses.replace(metrics, health=None))
                done += 1
                due = done % eval_every == 0 or done == phase.steps
                measured = health_every is not None and (first + done) % health_every == 0
                if due or measured or done % log_every == 0:
                    record = log.make_record(phase, first + done, max_skipped)
                    if measured:
                        report(_health_record(state, metrics, phase, first + done))
                    report(record)
                    if due:
                        with clock.during("evaluation"):
                            _evaluate(state, phase, first + done, held_out, report, step_config)
                    log.start_clock()
                if after_step(state, first + done, partial(_position, number, done, data, log)):
                    return state
    return state


class _Log:
    """The steps since the last record.

    Attributes:
        metrics: of each step, without its health.
        waited: seconds that they waited for their batches.
        bad, left_out: as in `Position`.
        first: steps of the run before the stage.
    """

    def __init__(self, start: Position | None):
        self.metrics = [] if start is None else [_metrics(row) for row in start.unreported]
        self.waited, self.bad = (0.0, 0) if start is None else (start.waited, start.bad)
        self.first = self.left_out = 0
        self._begin = time.perf_counter() - (0 if start is None else start.seconds)

    @property
    def seconds(self) -> float:
        """Since the last record and what was done upon it."""
        return time.perf_counter() - self._begin

    def start_clock(self) -> None:
        """The next record covers the time from here on."""
        self._begin = time.perf_counter()

    def next_batch(self, data: Iterator[Batch]) -> Batch:
        """The next batch, and the time until it is there."""
        begin = time.perf_counter()
        batch = next(data)
        self.waited += time.perf_counter() - begin
        return batch

    def leave_out(self, data: Iterator[Batch], count: int) -> None:
        """Leaves batches out until there are `count` that the stage has left out."""
        while self.left_out < count:
            next(data)
            self.left_out += 1

    def make_record(self, phase: Phase, step: int, max_skipped: float) -> TrainRecord:
        """The record of the steps up to `step`, which are then forgotten.

        Raises:
            DivergedError: as `train`.
        """
        steps = jax.device_get(self.metrics)
        for number, metrics in enumerate(steps, step - len(steps) + 1):
            self.bad = 0 if math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm) else self.bad + 1
            if self.bad >= max_skipped:
                raise DivergedError(
                    f"{self.bad} steps in a row, the last of them step {number}, had a loss or a gradient that is not "
                    "finite, and were skipped",
                    step=number - self.bad + 1,
                    phase=phase.name,
                    batch=number - self.first + self.left_out,
                )
        finite = [float(metrics.loss) for metrics in steps if math.isfinite(metrics.loss)]
        record = TrainRecord(
            phase=phase.name,
            step=step,
            loss=sum(finite) / len(finite) if finite else math.nan,
            grad_norm=float(steps[-1].grad_norm),
            learning_rate=float(steps[-1].learning_rate),
            tokens=sum(int(metrics.tokens) for metrics in steps),
            seconds=self.seconds,
            skipped=int(steps[-1].skipped),
            waited=self.waited,
        )
        self.metrics, self.waited = [], 0.0
        return record


def _done_in(start: Position | None, stage: int, phase: Phase) -> int:
    """Steps of a stage that lie before the start."""
    if start is None or stage > start.stage:
        return 0
    return start.done if stage == start.stage else phase.steps


def _position(stage: int, done: int, data: grain.DatasetIterator[Batch], log: _Log) -> Position:
    rows = [_numbers(metrics) for metrics in jax.device_get(log.metrics)]
    return Position(
        stage=stage,
        done=done,
        data=data.get_state(),
        unreported=rows,
        seconds=log.seconds,
        waited=log.waited,
        bad=log.bad,
        left_out=log.left_out,
    )


def _numbers(metrics: StepMetrics) -> list[float]:
    """What a step saw, without its health, for JSON."""
    return [value.item() for value in jax.tree.leaves(dataclasses.replace(metrics, health=None))]


def _metrics(numbers: Sequence[float]) -> StepMetrics:
    """What had these numbers."""
    loss, grad_norm, learning_rate, tokens, skipped = map(jnp.asarray, numbers)
    return StepMetrics(loss=loss, grad_norm=grad_norm, learning_rate=learning_rate, tokens=tokens, skipped=skipped)


def _health_record(state: TrainState, metrics: StepMetrics, phase: Phase, step: int) -> HealthRecord:
    if metrics.health is None:
        raise ValueError("the step measures no health: expected one that is compiled with the same health_every")
    layers, rate = state.model.config.hybrid_layers, float(metrics.learning_rate)
    return health_record(metrics.health, layers, phase=phase.name, step=step, rate=rate)


def _evaluate(
    state: TrainState,
    phase: Phase,
    step: int,
    held_out: Mapping[str, Sequence[Batch]],
    report: Report,
    config: StepConfig,
) -> None:
    for name, rows in held_out.items():
        report(EvalRecord(phase=phase.name, step=step, held_out=name, **evaluate(state.model, rows, config)._asdict()))
