"""What many runs show on the terminal: a bar of all their steps, and a line for each that is done."""

from collections.abc import Iterable, Sequence
from types import TracebackType

from rich import progress as rich_progress
from rich.console import Console

from zamba2_jax.lab.result import Outcome
from zamba2_jax.lab.trials import Trial
from zamba2_jax.train.metrics import EvalRecord, Record, TrainRecord
from zamba2_jax.train.schedule import boundaries


class Progress:
    """Shows records as they come; a context manager around the runs."""

    def __init__(self, trials: Sequence[Trial], done: Iterable[Outcome], console: Console):
        self._console = console
        steps = {trial.name: boundaries(trial.config.phases)[-1] for trial in trials}
        self._steps, self._total = steps, sum(steps.values())
        self._taken = {outcome.name: steps[outcome.name] for outcome in done}
        self._done = len(self._taken)
        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(bar_width=24),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[numbers]}"),
            rich_progress.TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=self._total, numbers="")
        if self._done:
            self.say(f"{self._done} of {len(steps)} runs are done already")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, trial: Trial, record: Record) -> None:
        """Takes note of one record of a run."""
        if not isinstance(record, TrainRecord | EvalRecord):
            return
        self._taken[trial.name] = record.step
        held_out = f"held-out {record.held_out} " if isinstance(record, EvalRecord) else "loss "
        self._update(f"{trial.name}: {held_out}{record.loss:.3f}")

    def finish(self, outcome: Outcome) -> None:
        """Says what came of a run."""
        self._done += 1
        self._taken[outcome.name] = self._steps[outcome.name]
        losses = [f"{name} {value:.3f}" for name, value in outcome.metrics.items() if name.endswith(".loss")]
        text = outcome.error or ", ".join(losses)
        self.say(
            f"{self._done}/{len(self._steps)} {outcome.name} {outcome.status}"
            f"{f': {text}' if text else ''} ({outcome.seconds:.0f} s)"
        )
        self._update("")

    def say(self, text: str) -> None:
        """Prints a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _update(self, numbers: str) -> None:
        description = f"{self._done}/{len(self._steps)} runs"
        self._bar.update(self._task, completed=sum(self._taken.values()), description=description, numbers=numbers)
