"""What the directories of runs say: settings that differ, how far each run is, and its numbers."""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.table import Table

from zamba2_jax.files import finite
from zamba2_jax.train import directory as layout
from zamba2_jax.train.config import flatten, nearest, parse_setting
from zamba2_jax.train.directory import is_running, read_run
from zamba2_jax.train.goodput import wall_time
from zamba2_jax.train.health import HealthWatch
from zamba2_jax.train.metrics import (
    EvalRecord,
    GoodputRecord,
    HealthRecord,
    Record,
    TrainRecord,
    as_record,
    read_records,
)
from zamba2_jax.train.schedule import boundaries

UNIQUE = "directory"
"""The setting that differs between any two runs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What the directory of a run says.

    Attributes:
        name: its directory, from the one that holds all that it is shown with.
        directory: of the run.
        settings: its config, by keys as "phases.0.steps".
        status: "finished", "running", "diverged" or "stopped".
        total: steps that it is to take.
        records: in the order of the steps.
    """

    name: str
    directory: Path
    settings: Mapping[str, Any]
    status: str
    total: int
    records: Sequence[Record]

    @property
    def train(self) -> list[TrainRecord]:
        """Records of training."""
        return [record for record in self.records if isinstance(record, TrainRecord)]

    @property
    def held_out(self) -> dict[str, list[EvalRecord]]:
        """Records of evaluation by held-out set."""
        sets: dict[str, list[EvalRecord]] = {}
        for record in self.records:
            if isinstance(record, EvalRecord):
                sets.setdefault(record.held_out, []).append(record)
        return sets

    @cached_property
    def warnings(self) -> list[str]:
        """What was wrong with its health, as `train.health.HealthWatch` says it."""
        watch = HealthWatch(self.total)
        return [text for record in self.records if isinstance(record, HealthRecord) for text in watch(record)]

    @property
    def tokens(self) -> dict[int, int]:
        """Tokens trained on up to each step that has a record of training, and up to the beginning."""
        reached, tokens = 0, {0: 0}
        for record in self.train:
            reached += record.tokens
            tokens[record.step] = reached
        return tokens

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Its numbers by name; those that it has no record for are not there.

        Names are those of TensorBoard where these have the number: "train/loss", "eval/prose/accuracy"; of the last
        record, but for "eval/prose/best_loss", the lowest so far, at step "eval/prose/best_step"; "goodput", the share
        of steps in the wall time of the run, and the seconds of all its parts, as "wall/steps".
        """
        train = self.train
        found: dict[str, float] = {"steps": max((record.step for record in self.records), default=0)}
        if train:
            seconds = sum(record.seconds for record in train)
            found |= {
                "tokens": self.tokens[train[-1].step],
                "seconds": seconds,
                "tokens_per_second": self.tokens[train[-1].step] / seconds,
                "train/loss": train[-1].loss,
                "train/grad_norm": train[-1].grad_norm,
                "skipped": train[-1].skipped,
            }
        for name, records in self.held_out.items():
            best = min(records, key=lambda record: math.inf if math.isnan(record.loss) else record.loss)
            values = {
                "loss": records[-1].loss,
                "accuracy": records[-1].accuracy,
                "bits_per_byte": records[-1].bits_per_byte,
                "best_loss": best.loss,
                "best_step": best.step,
            }
            found |= {f"eval/{name}/{key}": value for key, value in values.items() if value is not None}
        wall = wall_time([record for record in self.records if isinstance(record, GoodputRecord)])
        if total := sum(wall.values()):
            found |= {"goodput": wall["steps"] / total, **{f"wall/{part}": value for part, value in wall.items()}}
        return found | {"warnings": len(self.warnings)}


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs that some directories are or hold, at any depth, by name.

    Raises:
        FileNotFoundError: a directory is not there, or there is no run in it.
        ValueError: a file of a run is not valid.
    """
    directories = sorted({run.resolve() for path in paths for run in _find(path)})
    above = os.path.commonpath([directory.parent for directory in directories])
    return [_read(directory, str(directory.relative_to(above))) for directory in directories]


def differing(runs: Sequence[Run]) -> list[str]:
    """The keys of settings that are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key != UNIQUE)
    return [key for key in keys if len({repr(run.settings.get(key)) for run in runs}) > 1]


def select(runs: Sequence[Run], conditions: Sequence[str]) -> list[Run]:
    """The runs that have all of some settings.

    Args:
        runs: to choose from.
        conditions: "key=value" each, as `train.config.parse_setting` reads it.

    Raises:
        ValueError: no run has such a key, or none has all the values.
    """
    for condition in conditions:
        key, value = parse_setting(condition, "--where")
        known = dict.fromkeys(key for run in runs for key in run.settings)
        if key not in known:
            raise ValueError(f"--where {condition}: {key} is unknown{nearest(key, known)}")
        there = sorted({repr(run.settings.get(key)) for run in runs})
        runs = [run for run in runs if key in run.settings and run.settings[key] == value]
        if not runs:
            raise ValueError(f"--where {condition}: no run has it, only {', '.join(there)}")
    return list(runs)


def by_name(runs: Sequence[Run], name: str, option: str) -> Run:
    """The run of a name.

    Raises:
        ValueError: there is none.
    """
    names = {run.name: run for run in runs}
    if name not in names:
        raise ValueError(f"{option} {name}: there is no such run{nearest(name, names)}")
    return names[name]


def metric_names(runs: Sequence[Run], chosen: Sequence[str] = ()) -> list[str]:
    """The names of metrics to show: those chosen, or all but the rarely wanted.

    Raises:
        ValueError: no run has a metric of a name that was chosen.
    """
    known = list(dict.fromkeys(name for run in runs for name in run.metrics))
    for name in chosen:
        if name not in known:
            raise ValueError(f"--metrics {name}: no run has it, expected some of {', '.join(known)}")
    rare = ("steps", "seconds", "grad_norm", "bits_per_byte", "best_step")
    shown = [name for name in known if name.split("/")[-1] not in rare and not name.startswith("wall/")]
    return list(chosen) or shown


def sort(runs: Sequence[Run], name: str) -> list[Run]:
    """Runs by a metric or a setting, from the smallest; those without it come last.

    Raises:
        ValueError: no run has either.
    """
    metrics = dict.fromkeys(name for run in runs for name in run.metrics)
    settings = dict.fromkeys(key for run in runs for key in run.settings)
    if name not in metrics and name not in settings:
        expected = ", ".join([*metrics, *differing(runs)])
        raise ValueError(f"--sort {name}: no run has it, expected a setting, or one of {expected}")

    def key(run: Run) -> tuple[int, float, str]:
        value = run.metrics.get(name) if name in metrics else run.settings.get(name)
        if isinstance(value, int | float):
            return (2, 0.0, "") if math.isnan(value) else (0, value, "")
        return (2, 0.0, "") if value is None else (1, 0.0, str(value))

    return sorted(runs, key=key)


def table(runs: Sequence[Run], metrics: Sequence[str], baseline: Run | None = None) -> Table:
    """Runs by row; in columns the settings that differ and these metrics, with what they are above the baseline."""
    settings = differing(runs)
    shown = Table()
    for name in ("run", *settings, "status"):
        shown.add_column(name, overflow="fold")
    for name in metrics:
        shown.add_column(name, justify="right", overflow="fold")
    for run in runs:
        status = run.status if run.status == "finished" else f"{run.status} at {run.metrics['steps']:g}/{run.total}"
        values = [_number(name, run, baseline) for name in metrics]
        shown.add_row(run.name, *(_text(run.settings.get(key)) for key in settings), status, *values)
    return shown


def as_dict(run: Run, baseline: Run | None = None) -> dict[str, Any]:
    """All that is known of a run but its records, for JSON; numbers that are not finite are None."""
    values: dict[str, Any] = {
        "name": run.name,
        "directory": str(run.directory),
        "status": run.status,
        "total": run.total,
        "settings": run.settings,
        "metrics": run.metrics,
        "warnings": run.warnings,
    }
    if baseline is not None:
        both = [name for name in run.metrics if name in baseline.metrics]
        values["differences"] = {name: run.metrics[name] - baseline.metrics[name] for name in both}
    return finite(values)


def _find(path: Path) -> Iterable[Path]:
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such directory")
    found = []
    for place, inner, files in os.walk(path):
        if layout.CONFIG in files and layout.ARCHITECTURE in files:
            found.append(Path(place))
            inner.clear()
    if not found:
        raise FileNotFoundError(
            f"{path} holds no run: expected a directory with {layout.CONFIG} and {layout.ARCHITECTURE}, as `zamba2 "
            "train` writes it, or one above such"
        )
    return found


def _read(directory: Path, name: str) -> Run:
    try:
        config, _ = read_run(directory)
        path = directory / layout.METRICS
        records = [as_record(line) for line in (read_records(path) if path.is_file() else ())]
    except ValueError as error:
        raise ValueError(f"the run in {directory}: {error}") from error
    total, steps = boundaries(config.phases)[-1], max((record.step for record in records), default=0)
    if is_running(directory):
        status = "running"
    elif (directory / layout.DIVERGED).is_file():
        status = "diverged"
    else:
        status = "finished" if steps >= total else "stopped"
    settings = flatten(config.as_dict())
    return Run(name=name, directory=directory, settings=settings, status=status, total=total, records=records)


def _number(name: str, run: Run, baseline: Run | None) -> str:
    value = run.metrics.get(name)
    if value is None:
        return "-"
    if baseline is None or run is baseline or name not in baseline.metrics:
        return f"{value:{_form(name)}}"
    return f"{value:{_form(name)}} ({value - baseline.metrics[name]:+{_form(name)}})"


def _form(name: str) -> str:
    """How the numbers of a metric are written."""
    last = name.split("/")[-1]
    return ".1%" if last in ("accuracy", "goodput") else ".4f" if "loss" in last or last == "bits_per_byte" else ",.6g"


def _text(value: Any) -> str:
    return "-" if value is None else str(value)
