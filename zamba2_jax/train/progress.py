"""What a run shows on the terminal: a bar per phase, or plain lines where there is no terminal."""

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zamba2_jax.train.health import HealthWatch, worst
from zamba2_jax.train.metrics import EvalRecord, GoodputRecord, HealthRecord, Record, TrainRecord
from zamba2_jax.train.schedule import Phase, boundaries

_LINES_PER_PHASE = 8


class ProgressView:
    """Shows records as they come; a context manager around the run."""

    def __init__(self, phases: Sequence[Phase], console: Console):
        self._console = console
        self._ends = dict(zip((phase.name for phase in phases), boundaries(phases), strict=True))
        self._steps = {phase.name: phase.steps for phase in phases}
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        width = max(map(len, self._steps))
        self._tasks = {
            name: self._bars.add_task(name.ljust(width), total=steps, start=False, numbers="")
            for name, steps in self._steps.items()
        }
        self._lines: dict[str, int] = {}
        self._trained = self._held_out = self._health = ""
        self._watch = HealthWatch(boundaries(phases)[-1])

    def __enter__(self) -> "ProgressView":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, record: Record) -> None:
        """Shows one record, but for the times of processes."""
        if isinstance(record, GoodputRecord):
            return
        steps = self._steps[record.phase]
        done = record.step - self._ends[record.phase] + steps
        if isinstance(record, EvalRecord):
            self._held_out = text = f"held-out {record.held_out} {record.loss:.3f}, accuracy {record.accuracy:.1%}"
            due = True
        elif isinstance(record, HealthRecord):
            self._health, text, due = worst(record), "", False
            for warning in self._watch(record):
                self._console.print(
                    f"Warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True
                )
        else:
            self._trained, due = _describe(record), self._line_is_due(record.phase, done)
            text = "  ".join(filter(None, (self._trained, self._health)))
        if not self._console.is_terminal and due:
            self._console.print(f"{record.phase} {done}/{steps}  {text}", markup=False, highlight=False, soft_wrap=True)
        task = self._tasks[record.phase]
        self._bars.start_task(task)
        self._bars.update(task, completed=done, numbers=self._numbers())

    def _numbers(self) -> str:
        return "  ".join(filter(None, (self._trained, self._held_out, self._health)))

    def _line_is_due(self, phase: str, done: int) -> bool:
        """Whether the phase has passed another of the places that get a line."""
        line = done * _LINES_PER_PHASE // self._steps[phase]
        due = line > self._lines.get(phase, 0)
        self._lines[phase] = max(line, self._lines.get(phase, 0))
        return due


def _describe(record: TrainRecord) -> str:
    numbers = f"loss {record.loss:.3f}  lr {record.learning_rate:.1e}  {record.tokens_per_second:,.0f} tok/s"
    return f"{numbers}  skipped {record.skipped}" if record.skipped else numbers
