"""Means over seeds with their errors, and how far variants are from a baseline."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table as RichTable
from scipy import stats

from zamba2_jax.files import finite

CONFIDENCE = 0.95
"""Of the intervals."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean less that of a baseline; NaN where there are too few seeds to say.

    Attributes:
        mean: the difference.
        low, high: ends of its interval of 95 % confidence.
        paired: whether it is that of the differences seed by seed (paired t-test), as it is where both have the same
            seeds and so the same data and initial weights of one shape; else Welch's.
    """

    mean: float
    low: float
    high: float
    paired: bool

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A metric of a variant.

    Attributes:
        variant, metric: of what.
        n: seeds that finished, and have the metric.
        diverged: seeds that diverged, and are not counted.
        mean, sd: over the seeds; sd is that of a sample (n - 1), NaN for one seed.
        difference: to the baseline; None for the baseline itself, and without one.
    """

    variant: str
    metric: str
    n: int
    diverged: int
    mean: float
    sd: float
    difference: Difference | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows that show themselves: as Markdown in `str` and notebooks, and in colour on a terminal of `rich`."""

    rows: tuple[Row, ...]
    baseline: str | None

    def __getitem__(self, key: tuple[str, str]) -> Row:
        """By variant and metric."""
        for row in self.rows:
            if (row.variant, row.metric) == key:
                return row
        raise KeyError(f"{key}: expected one of {[(row.variant, row.metric) for row in self.rows]}")

    def markdown(self) -> str:
        """A table of Markdown."""
        heads, lines = self._heads(), [self._cells(row) for row in self.rows]
        rule = ["---", "---", *["--:"] * (len(heads) - 2)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines))

    __str__ = markdown
    _repr_markdown_ = markdown

    def __rich__(self) -> RichTable:
        table = RichTable()
        for i, head in enumerate(self._heads()):
            table.add_column(head, justify="left" if i < 2 else "right", overflow="fold")
        for row in self.rows:
            strong = row.difference is not None and row.difference.is_significant
            table.add_row(*self._cells(row), style="bold" if strong else None)
        return table

    def as_dicts(self) -> list[dict[str, Any]]:
        """A dict for each row, for JSON or a data frame; numbers that are not finite are None."""
        names = [field.name for field in dataclasses.fields(Difference)]
        found = []
        for row in self.rows:
            values = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
            apart = values.pop("difference")
            values |= {f"difference_{name}": getattr(apart, name, None) for name in names}
            found.append(finite(values))
        return found

    def _heads(self) -> list[str]:
        against = [] if self.baseline is None else [f"less {self.baseline}", "95 % interval"]
        return ["variant", "metric", "mean", "sd", "n", *against]

    def _cells(self, row: Row) -> list[str]:
        count = f"{row.n} ({row.diverged} diverged)" if row.diverged else str(row.n)
        cells = [row.variant, row.metric, _number(row.mean), _number(row.sd), count]
        if self.baseline is None:
            return cells
        if row.difference is None:
            return [*cells, "", ""]
        of = row.difference
        known = math.isfinite(of.low)
        ends = f"{of.low:+.4g} to {of.high:+.4g}{'' if of.paired else ' (unpaired)'}" if known else ""
        return [*cells, f"{of.mean:+.4g}" if math.isfinite(of.mean) else "", ends]


def summarize(variant: str, metric: str, values: Sequence[float], diverged: int, difference: Difference | None) -> Row:
    """The row of a metric whose values over the seeds are given."""
    array = np.asarray(values, np.float64)
    return Row(
        variant=variant,
        metric=metric,
        n=len(array),
        diverged=diverged,
        mean=float(array.mean()) if len(array) else math.nan,
        sd=float(array.std(ddof=1)) if len(array) > 1 else math.nan,
        difference=difference,
    )


def difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """How far values by seed are from a baseline's, with the t-interval of 95 %: paired where the seeds are the same.

    Unpaired, degrees of freedom are those of Welch (1947) and Satterthwaite.
    """
    paired = set(values) == set(baseline)
    ours, theirs = (np.array([of[seed] for seed in sorted(of)], np.float64) for of in (values, baseline))
    if not len(ours) or not len(theirs):
        return Difference(mean=math.nan, low=math.nan, high=math.nan, paired=paired)
    mean = float(ours.mean() - theirs.mean())
    if min(len(ours), len(theirs)) < 2:
        return Difference(mean=mean, low=math.nan, high=math.nan, paired=paired)
    if paired:
        error, freedom = float((ours - theirs).std(ddof=1)) / math.sqrt(len(ours)), len(ours) - 1.0
    else:
        parts = [float(of.var(ddof=1)) / len(of) for of in (ours, theirs)]
        error = math.sqrt(sum(parts))
        below = sum(part**2 / (len(of) - 1) for part, of in zip(parts, (ours, theirs), strict=True))
        freedom = sum(parts) ** 2 / below if below else 1.0
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return Difference(mean=mean, low=mean - margin, high=mean + margin, paired=paired)


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else ""
