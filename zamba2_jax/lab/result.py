"""What came of the runs: of each, and over seeds."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from zamba2_jax.checkpoint.hf import load_hf, save_hf
from zamba2_jax.files import read_json, write_directory_atomically, write_json
from zamba2_jax.lab.table import Table, difference, summarize
from zamba2_jax.models.base import LanguageModel
from zamba2_jax.models.registry import init_model
from zamba2_jax.nn.parameter import named_parameters, with_values
from zamba2_jax.text.tokenizer import Tokenizer
from zamba2_jax.text.vocabulary import copy_tokenizer
from zamba2_jax.train import directory as layout
from zamba2_jax.train.config import RunConfig
from zamba2_jax.train.export import with_token_ids
from zamba2_jax.train.metrics import read_records

SWEEP, RESULT, MODEL = "sweep.json", "result.json", "model"
"""Files of a sweep beside its runs; of a run, written last, so that it says that the run is done; its model."""

Status = Literal["finished", "diverged"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one run.

    Attributes:
        variant: name of the variant.
        seed: of the run.
        config: of the run.
        status: "diverged" where `config.max_skipped` steps in a row were not finite.
        error: in what way it diverged; None otherwise.
        metrics: at the end, by name: of each held-out source, as of "prose", "prose.loss" in nats per token,
            "prose.accuracy" and, where it is known, "prose.bits_per_byte"; what the loss rises by with a part silenced
            as "necessity.prose.all.attention". Numbers that are not finite are left out; empty where it diverged.
        records: as the lines of metrics.jsonl, in order.
        necessity: by held-out source, `Necessity.as_dict()`.
        seconds: from its first step to its last, with evaluations.
        trained, tokenizer: the model and what it was trained with, where they are held in memory.
        directory: of the run, where it has one.
    """

    variant: str
    seed: int
    config: RunConfig
    status: Status
    error: str | None
    metrics: Mapping[str, float]
    records: tuple[Mapping[str, Any], ...] = dataclasses.field(repr=False)
    necessity: Mapping[str, Mapping[str, Any]] = dataclasses.field(repr=False)
    seconds: float
    trained: LanguageModel | None = dataclasses.field(default=None, repr=False, compare=False)
    tokenizer: Tokenizer | None = dataclasses.field(default=None, repr=False, compare=False)
    directory: Path | None = dataclasses.field(default=None, compare=False)

    @property
    def name(self) -> str:
        """As "wide/seed-3"."""
        return f"{self.variant}/seed-{self.seed}"

    def model(self) -> LanguageModel:
        """The trained model, from memory or from the directory.

        Raises:
            ValueError: there is none, as the run diverged.
            OSError, ValueError: as `load_hf`.
        """
        if self.trained is not None:
            return self.trained
        if self.status == "diverged" or self.directory is None:
            raise ValueError(f"{self.name} {self.status}: it left no model")
        return load_hf(self.directory / MODEL)

    def curve(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps, int64 [n], and values, float64 [n], of "train.loss" or of a held-out number, as "prose.loss"."""
        source, _, key = metric.rpartition(".")
        lines = [
            line
            for line in self.records
            if (line["kind"] == "train" and source == "train") or line.get("held_out") == source
        ]
        values = [np.nan if line.get(key) is None else line[key] for line in lines]
        return np.array([line["step"] for line in lines], np.int64), np.array(values, np.float64)

    def ratios(self) -> list[float]:
        """rms(shared output) / rms(residual) of every call of a shared block, when health was last looked at."""
        looks = [line["calls"] for line in self.records if line["kind"] == "health"]
        return [call["ratio"] for call in looks[-1].values()] if looks else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What came of the runs of several variants.

    Attributes:
        outcomes: of each run, seed by seed within a variant.
        baseline: the variant that others are compared with, None for none.
    """

    outcomes: tuple[Outcome, ...]
    baseline: str | None = None

    @property
    def variants(self) -> list[str]:
        """Their names, in order."""
        return list(dict.fromkeys(outcome.variant for outcome in self.outcomes))

    def __getitem__(self, variant: str) -> tuple[Outcome, ...]:
        """The outcomes of a variant, by seeds."""
        found = tuple(outcome for outcome in self.outcomes if outcome.variant == variant)
        if not found:
            raise KeyError(f"{variant}: expected one of {', '.join(self.variants)}")
        return found

    def table(self, *, metrics: Sequence[str] | None = None, baseline: str | None = None) -> Table:
        """Means over the seeds that finished, and differences to a baseline.

        Args:
            metrics: shell-style patterns of names of metrics, as "necessity.prose.all.*"; by default all losses and
                accuracies.
            baseline: a variant, by default that of the result.

        Raises:
            KeyError: there is no such variant.
            ValueError: a pattern fits no metric.
        """
        baseline = self.baseline if baseline is None else baseline
        known = {variant: self._by_metric(variant) for variant in self.variants}
        against = None if baseline is None else self._by_metric(self[baseline][0].variant)
        rows = []
        for metric in self._chosen(metrics):
            for variant, found in known.items():
                values = found.get(metric, {})
                apart = None if against is None or variant == baseline else difference(values, against.get(metric, {}))
                lost = sum(outcome.status == "diverged" for outcome in self[variant])
                rows.append(summarize(variant, metric, list(values.values()), lost, apart))
        return Table(rows=tuple(rows), baseline=baseline)

    def plot(self, *, metrics: Sequence[str] | None = None) -> Figure:
        """Draws the training losses, mean and standard deviation over seeds, and beside them each metric's seeds.

        Args:
            metrics: as of `table`; by default the held-out losses.
        """
        chosen = self._chosen(metrics or ("*.loss",))
        height = 1.2 + 0.35 * len(self.variants)
        figure = Figure(figsize=(7 + 3 * len(chosen), max(4, height)), dpi=120, layout="constrained")
        curves, *axes = np.atleast_1d(figure.subplots(1, 1 + len(chosen), width_ratios=[2, *[1] * len(chosen)]))
        for i, variant in enumerate(self.variants):
            found = [outcome.curve("train.loss") for outcome in self[variant]]
            longest = max((steps for steps, _ in found), key=len)
            values = np.full((len(found), len(longest)), np.nan)
            for row, (_, losses) in zip(values, found, strict=True):
                row[: len(losses)] = losses
            values = np.ma.masked_invalid(values)
            mean, sd = values.mean(axis=0), values.std(axis=0)
            curves.plot(longest, mean, color=f"C{i % 10}", label=variant, linewidth=1.2)
            curves.fill_between(longest, mean - sd, mean + sd, color=f"C{i % 10}", alpha=0.2, linewidth=0)
        curves.set(xlabel="step", ylabel="training loss, nats per token")
        curves.legend(fontsize=8)
        for axis, metric in zip(axes, chosen, strict=True):
            for i, variant in enumerate(self.variants):
                dots = np.array(list(self._by_metric(variant).get(metric, {}).values()))
                axis.plot(dots, np.full(len(dots), i), "o", color=f"C{i % 10}", alpha=0.6)
                if len(dots):
                    axis.plot(dots.mean(), i, "|", color="black", markersize=16)
            axis.set_yticks(range(len(self.variants)), self.variants if axis is axes[0] else [""] * len(self.variants))
            axis.set(xlabel=metric, ylim=(len(self.variants) - 0.5, -0.5))
            axis.grid(axis="x", linewidth=0.5)
        return figure

    def save(self, directory: Path | str) -> None:
        """Writes all runs with their models, in the form that `fit` leaves in a directory, and `load` reads.

        Raises:
            FileExistsError: the directory is there and not empty.
            ValueError, OSError: as `save_hf`.
        """

        def write(temporary: Path) -> None:
            for outcome in self.outcomes:
                write_outcome(outcome, temporary / outcome.name, str(Path(directory) / outcome.name))
            write_sweep(temporary, [outcome.name for outcome in self.outcomes], self.baseline)

        write_directory_atomically(Path(directory), write)

    @classmethod
    def load(cls, directory: Path | str) -> "Result":
        """Reads what `save` has written, or `fit` and `zamba2 sweep`; of those the runs that are done.

        Models stay on the disk until `Outcome.model` is asked for them.

        Raises:
            FileNotFoundError: there is no sweep.
            ValueError: a file is not valid.
        """
        directory = Path(directory)
        if not (directory / SWEEP).is_file():
            raise FileNotFoundError(f"{directory} is not the directory of a sweep: there is no {SWEEP} in it")
        sweep = read_json(directory / SWEEP)
        outcomes = [read_outcome(directory / name) for name in sweep["runs"] if (directory / name / RESULT).is_file()]
        return cls(outcomes=tuple(outcomes), baseline=sweep["baseline"])

    def _chosen(self, patterns: Sequence[str] | None) -> list[str]:
        """The metrics that fit one of the patterns, in the order of the runs."""
        known = list(dict.fromkeys(metric for outcome in self.outcomes for metric in outcome.metrics))
        if patterns is None:
            return [
                name for name in known if name.endswith((".loss", ".accuracy")) and not name.startswith("necessity.")
            ]
        for pattern in patterns:
            if known and not any(fnmatchcase(name, pattern) for name in known):
                raise ValueError(f"{pattern!r} fits no metric: expected one of {', '.join(known)}")
        return [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns)]

    def _by_metric(self, variant: str) -> dict[str, dict[int, float]]:
        """By metric and seed."""
        found: dict[str, dict[int, float]] = {}
        for outcome in self[variant]:
            for metric, value in outcome.metrics.items():
                found.setdefault(metric, {})[outcome.seed] = value
        return found


def write_sweep(directory: Path, runs: Sequence[str], baseline: str | None) -> None:
    """Writes down which runs belong to a sweep."""
    write_json(directory / SWEEP, {"runs": list(runs), "baseline": baseline})


def write_outcome(outcome: Outcome, directory: Path, place: str) -> None:
    """Writes all of a run, the file that says that it is done last.

    Args:
        outcome: of the run.
        directory: to write.
        place: where that will be.

    Raises:
        ValueError, OSError: as `save_hf`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config, architecture, tokenizer = outcome.config, outcome.config.model.resolve(), outcome.tokenizer
    if outcome.directory is not None:
        tokenizer = layout.open_tokenizer(config, outcome.directory, architecture.vocab_size)
    layout.write_run(dataclasses.replace(config, directory=place), architecture, tokenizer, directory)
    lines = "".join(json.dumps(line) + "\n" for line in outcome.records)
    (directory / layout.METRICS).write_text(lines, encoding="utf-8")
    if outcome.status == "finished":
        write_model(outcome.model(), tokenizer, directory)
    write_result(outcome, directory)


def write_model(model: LanguageModel, tokenizer: Tokenizer | None, directory: Path) -> None:
    """Writes the model of a run as a Hugging Face checkpoint, with the tokenizer that is there already."""
    if tokenizer is not None:
        architecture = with_token_ids(model.config, tokenizer)
        like = jax.eval_shape(lambda: init_model(architecture, rngs=nnx.Rngs(0), dtype=model.dtype))
        model = with_values(like, {name: leaf.get_value() for name, leaf in named_parameters(model).items()})
    save_hf(model, directory / MODEL)
    if (directory / layout.TOKENIZER).is_dir():
        copy_tokenizer(directory / layout.TOKENIZER, directory / MODEL)


def write_result(outcome: Outcome, directory: Path) -> None:
    """Writes the file that says that a run is done."""
    names = ("variant", "seed", "status", "error", "metrics", "necessity", "seconds")
    write_json(directory / RESULT, {name: getattr(outcome, name) for name in names})


def read_outcome(directory: Path) -> Outcome:
    """A run that is done.

    Raises:
        ValueError: a file is not valid.
        OSError: a file is missing.
    """
    values = read_json(directory / RESULT)
    config, _ = layout.read_run(directory)
    records = tuple(read_records(directory / layout.METRICS))
    return Outcome(**values, config=config, records=records, directory=directory)
