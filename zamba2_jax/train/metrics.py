"""What a run reports, and where it goes."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

from zamba2_jax.files import finite


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
        waited: seconds of those that the steps waited for their batches.
        memory: bytes, the most that a device of this process held so far, or the process where devices do not say.
        utilisation: model FLOP/s over what the devices can do at most, None where that is not known; see `train.peak`.
    """

    phase: str
    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    skipped: int
    waited: float = 0.0
    memory: int | None = None
    utilisation: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Speed over the stretch."""
        return self.tokens / self.seconds

    @property
    def perplexity(self) -> float:
        """Of the loss."""
        return perplexity(self.loss)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """An evaluation.

    Attributes:
        phase: name of the phase.
        step: steps taken since the start of the run.
        held_out: which held-out set.
        loss: mean over it by the weights of its tokens, in nats per token.
        accuracy: of its tokens with a weight above 0, the share that the model finds likeliest.
        bits_per_byte: the loss per byte of its text; None where that is not known, as of synthetic tasks.
    """

    phase: str
    step: int
    held_out: str
    loss: float
    accuracy: float
    bits_per_byte: float | None = None

    @property
    def perplexity(self) -> float:
        """Of the loss."""
        return perplexity(self.loss)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallHealth:
    """A call of a shared block in one step; numbers of a batch without tokens are NaN.

    Attributes:
        ratio: rms of the call's output over that of the residual stream that it reads.
        share: of the mixer's input, before its norm, that comes from the call, mean over tokens; the residual's is
            the rest. Below 0 where the two point apart.
        entropy: of each attention head over that of uniform attention; see `ops.attention_entropy`.
    """

    ratio: float
    share: float
    entropy: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupHealth:
    """A group of parameters in one step.

    Attributes:
        grad_norm: of its gradient, before clipping.
        update: norm of what the step adds to its parameters, over theirs.
        step: rms of what the step adds, over the learning rate; NaN where that is 0.
    """

    grad_norm: float
    update: float
    step: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealthRecord:
    """Whether a step used all parts of the model; see docs/health.md.

    Attributes:
        phase: name of the phase.
        step: steps taken since the start of the run, this one included.
        calls: of the shared blocks, by the layer, as "layers.3".
        groups: of parameters, by the names in `train.health.GROUPS`.
    """

    phase: str
    step: int
    calls: Mapping[str, CallHealth]
    groups: Mapping[str, GroupHealth]


HEALTHY_RATIOS = (0.05, 3.0)
"""Of `CallHealth`: between idle and drowning. A run warns further out, see `train.health`."""

Part = Literal["steps", "data", "compile", "checkpoint", "evaluation", "start"]
"""What a process of a run spends wall time on; `start` is what comes before the first step, without compiling."""
PARTS: tuple[Part, ...] = get_args(Part)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoodputRecord:
    """What a process of a run has spent its wall time on up to a checkpoint; see `train.goodput`.

    Attributes:
        step: steps taken since the start of the run.
        first: those that earlier processes had taken.
        began: when the process began, in UTC, as ISO 8601 writes it; which process it is.
        cause: why `zamba2 train --restarts` started the process; None where it did not.
        steps, data, compile, checkpoint, evaluation, start: seconds since then, all of them; steps without the waiting
            for batches, checkpoints as far as steps waited for them.
    """

    step: int
    first: int
    began: str
    cause: str | None = None
    steps: float = 0.0
    data: float = 0.0
    compile: float = 0.0
    checkpoint: float = 0.0
    evaluation: float = 0.0
    start: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by part."""
        return {part: getattr(self, part) for part in PARTS}

    @property
    def seconds(self) -> float:
        """Since the process began."""
        return sum(self.parts.values())


Record = TrainRecord | EvalRecord | HealthRecord | GoodputRecord
Report = Callable[[Record], None]


class JsonLines:
    """Writes records to a file as they come, one JSON object a line; a number that is not finite becomes null."""

    def __init__(self, path: Path, *, append: bool = False):
        """A new file, or with `append` the lines of an earlier one kept, but for a last one that was cut off."""
        if append and path.exists():
            _cut_partial_line(path)
        self._file = path.open("a" if append else "w", encoding="utf-8")

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __call__(self, record: Record) -> None:
        """Writes one record."""
        self._file.write(json.dumps(as_line(record)) + "\n")
        self._file.flush()


class TensorBoard:
    """Writes the numbers of records to event files."""

    def __init__(self, directory: Path, *, first_step: int):
        """Into a directory that may hold earlier files; what they say from `first_step` on is hidden."""
        # Only a run needs it, and it takes half a second to import.
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=first_step)

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def __call__(self, record: Record) -> None:
        """Writes one record."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.step)


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a record, but for its step, by the names that TensorBoard shows, as "eval/prose/loss"."""
    group = f"eval/{record.held_out}" if isinstance(record, EvalRecord) else KINDS[type(record)]
    values = _values(record)
    if isinstance(record, TrainRecord):
        values["tokens_per_second"] = record.tokens_per_second
    return {
        f"{group}/{name}": value for name, value in _flat(values) if isinstance(value, int | float) and name != "step"
    }


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a run, each step's last one of its kind, in the order of the steps.

    A run that was interrupted repeats steps that came after its last checkpoint; of kind "goodput" the last line of a
    step is kept for each process. A last line without its end, which is being written or was cut off, is left out.

    Raises:
        ValueError: a line is not a record in JSON.
        OSError: there is no such file.
    """
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from error
        if not isinstance(lines[-1], dict) or lines[-1].get("kind") not in KINDS.values() or "step" not in lines[-1]:
            raise ValueError(f"{path}, line {number}: expected a record of kind {', '.join(KINDS.values())}")
    order = list(KINDS.values())
    last = {
        (line["step"], order.index(line["kind"]), line.get("held_out") or line.get("began", "")): line for line in lines
    }
    return [last[key] for key in sorted(last)]


def as_line(record: Record) -> dict[str, Any]:
    """A record for JSON, as `read_records` gives it; a number that is not finite is None."""
    return finite({"kind": KINDS[type(record)], **_values(record)})


def as_record(line: Mapping[str, Any]) -> Record:
    """The record that a line was written from; null where there has to be a number is NaN.

    Raises:
        ValueError: it lacks something.
    """
    try:
        if line["kind"] == KINDS[HealthRecord]:
            calls = {
                name: CallHealth(**{**_numbers(call), "entropy": tuple(map(_number, call["entropy"]))})
                for name, call in line["calls"].items()
            }
            groups = {name: GroupHealth(**_numbers(group)) for name, group in line["groups"].items()}
            return HealthRecord(phase=line["phase"], step=line["step"], calls=calls, groups=groups)
        kind = next(kind for kind, name in KINDS.items() if name == line["kind"])
        fields = [field for field in dataclasses.fields(kind) if field.name in line]
        values = {
            field.name: _number(line[field.name]) if field.default is dataclasses.MISSING else line[field.name]
            for field in fields
        }
        return kind(**values)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{dict(line)} is not a record: {error}") from error


def _numbers(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _number(value) for name, value in table.items()}


def _number(value: Any) -> Any:
    return math.nan if value is None else value


def tee(*reports: Report) -> Report:
    """Gives every record to each of `reports`."""

    def report(record: Record) -> None:
        for receive in reports:
            receive(record)

    return report


def perplexity(nats_per_token: float) -> float:
    """The exponential of a loss; infinite where it is too large for a float."""
    return math.exp(nats_per_token) if not nats_per_token > 700 else math.inf


def bits_per_byte(nats_per_token: float, tokens: int, size: int) -> float:
    """A loss per token in the unit that does not depend on the tokenizer, for a text of `tokens` and `size` bytes."""
    return nats_per_token / math.log(2) * tokens / size


KINDS: dict[type[Record], str] = {
    HealthRecord: "health",
    TrainRecord: "train",
    EvalRecord: "eval",
    GoodputRecord: "goodput",
}
"""What each kind of record is called, in the order in which those of a step come."""


def _values(record: Record) -> dict[str, Any]:
    values = dataclasses.asdict(record)
    return values | {"perplexity": record.perplexity} if isinstance(record, TrainRecord | EvalRecord) else values


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What is in nested tables, and in lists by its number, by names like paths."""
    if isinstance(value, Mapping | tuple):
        inner = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, each in inner:
            yield from _flat(each, f"{name}/{key}" if name else str(key))
    else:
        yield name, value


def _cut_partial_line(path: Path) -> None:
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
