"""What a run reports, and where it goes."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import TracebackType


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRecord:
    """A stretch of training steps.

    Attributes:
        phase: name of the phase.
        step: steps taken since the start of the run.
        loss: mean over the stretch, skipped steps left out, in nats per token.
        grad_norm: of the last step, before clipping.
        learning_rate: of the last step.
        tokens: trained on in the stretch.
        seconds: the stretch took, without evaluation.
        skipped: steps skipped since the start of the run, their loss or gradient not being finite.
    """

    phase: str
    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    skipped: int

    @property
    def tokens_per_second(self) -> float:
        """Speed over the stretch."""
        return self.tokens / self.seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """An evaluation.

    Attributes:
        phase: name of the phase.
        step: steps taken since the start of the run.
        held_out: which held-out set.
        loss: mean over it, in nats per token.
    """

    phase: str
    step: int
    held_out: str
    loss: float


Record = TrainRecord | EvalRecord
Report = Callable[[Record], None]


class JsonLines:
    """Writes records to a file as they come, one JSON object a line; a number that is not finite becomes null."""

    def __init__(self, path: Path):
        self._file = path.open("w", encoding="utf-8")

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __call__(self, record: Record) -> None:
        """Writes one record."""
        values = {"kind": "train" if isinstance(record, TrainRecord) else "eval", **dataclasses.asdict(record)}
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()


def tee(*reports: Report) -> Report:
    """Gives every record to each of `reports`."""

    def report(record: Record) -> None:
        for receive in reports:
            receive(record)

    return report


def bits_per_byte(nats_per_token: float, tokens: int, size: int) -> float:
    """A loss per token in the unit that does not depend on the tokenizer, for a text of `tokens` and `size` bytes."""
    return nats_per_token / math.log(2) * tokens / size
