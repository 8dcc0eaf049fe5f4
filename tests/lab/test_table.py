import io
import math

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from tests.train.runs import config
from zamba2_jax.lab.result import Outcome, Result
from zamba2_jax.lab.table import difference

# Two that have the seeds 0 to 4 in common, and one of others, of which one diverged.
LOSSES = {
    "base": {0: 3.1, 1: 3.4, 2: 2.9, 3: 3.3, 4: 3.05},
    "wide": {0: 2.9, 1: 3.3, 2: 2.75, 3: 3.15, 4: 2.8},
    "deep": {5: 3.2, 6: 3.9, 7: None, 8: 3.0},
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    run = config(tmp_path_factory.mktemp("table"))

    def outcome(variant, seed, loss):
        records = [{"kind": "train", "step": step, "loss": 4.0 - 0.01 * step * (1 + seed)} for step in (3, 6, 9)]
        return Outcome(
            variant=variant,
            seed=seed,
            config=run,
            status="finished" if loss else "diverged",
            error=None if loss else "2 steps in a row",
            metrics={"prose.loss": loss, "prose.accuracy": 1 / loss, "necessity.prose.all.mixer": 0.5} if loss else {},
            records=tuple(records[: None if loss else 1]),
            necessity={},
            seconds=1.0,
        )

    outcomes = [outcome(variant, seed, loss) for variant, of in LOSSES.items() for seed, loss in of.items()]
    return Result(outcomes=tuple(outcomes), baseline="base")


def finite(variant):
    return np.array([loss for loss in LOSSES[variant].values() if loss])


def test_means_and_intervals_are_those_of_scipy(result):
    table = result.table()
    assert {row.metric for row in table.rows} == {"prose.loss", "prose.accuracy"}
    for variant in LOSSES:
        row, values = table[variant, "prose.loss"], finite(variant)
        assert (row.n, row.mean, row.sd) == (
            len(values),
            pytest.approx(values.mean()),
            pytest.approx(values.std(ddof=1)),
        )
    assert table["base", "prose.loss"].difference is None
    paired = stats.ttest_rel(finite("wide"), finite("base")).confidence_interval(0.95)
    welch = stats.ttest_ind(finite("deep"), finite("base"), equal_var=False).confidence_interval(0.95)
    for variant, interval, is_paired in (("wide", paired, True), ("deep", welch, False)):
        found = table[variant, "prose.loss"].difference
        assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
        assert found.mean == pytest.approx(finite(variant).mean() - finite("base").mean())
        assert found.paired == is_paired
    assert table["wide", "prose.loss"].difference.is_significant
    assert not table["deep", "prose.loss"].difference.is_significant
    assert table["deep", "prose.loss"].diverged == 1


def test_one_seed_has_no_interval():
    found = difference({0: 2.0}, {0: 3.0})
    assert found.mean == -1
    assert math.isnan(found.low)
    assert not found.is_significant
    assert math.isnan(difference({}, {0: 3.0}).mean)


def test_what_a_table_shows(result):
    table = result.table(metrics=("prose.loss",))
    lines = table.markdown().splitlines()
    assert lines[0] == "| variant | metric | mean | sd | n | less base | 95 % interval |"
    assert lines[2] == "| base | prose.loss | 3.15 | 0.2 | 5 |  |  |"
    assert lines[4].startswith("| deep | prose.loss | 3.367 | 0.4726 | 3 (1 diverged) | +0.2167 | ")
    assert lines[4].endswith(" (unpaired) |")
    console = Console(width=140, file=io.StringIO())
    console.print(table)
    assert "3 (1 diverged)" in console.file.getvalue()
    base, wide, _ = table.as_dicts()
    assert (base["difference_mean"], wide["difference_mean"]) == (None, pytest.approx(-0.17))
    assert result.table(metrics=("necessity.*",), baseline="wide")["base", "necessity.prose.all.mixer"].mean == 0.5
    with pytest.raises(ValueError, match=r"'copying.\*' fits no metric: expected one of prose.loss, "):
        result.table(metrics=("copying.*",))
    with pytest.raises(KeyError, match="small: expected one of base, wide, deep"):
        result.table(baseline="small")


def test_the_picture_has_a_curve_for_each_variant_and_a_dot_for_each_seed(result):
    curves, dots = result.plot().axes
    lines = {line.get_label(): line for line in curves.get_lines()}
    assert list(lines) == list(LOSSES)
    expected = np.mean([[4.0 - 0.01 * step * (1 + seed) for step in (3, 6, 9)] for seed in LOSSES["wide"]], axis=0)
    np.testing.assert_allclose(lines["wide"].get_ydata(), expected)
    assert dots.get_xlabel() == "prose.loss"
    drawn = [line for line in dots.get_lines() if line.get_marker() == "o"]
    np.testing.assert_allclose(drawn[2].get_xdata(), finite("deep"))
