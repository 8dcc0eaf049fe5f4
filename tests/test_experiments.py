import json
import runpy
import sys
from pathlib import Path

import pytest

HEALTH = Path(__file__).parents[1] / "experiments" / "health"


@pytest.mark.slow
def test_the_experiment_on_health_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--output", str(tmp_path)])
    runpy.run_path(str(HEALTH / "run.py"), run_name="__main__")
    results = json.loads((tmp_path / "results.json").read_text())
    assert {len(runs) for part in results.values() for runs in part.values()} == {1}
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_its_results_are_those_of_its_variants():
    variants = runpy.run_path(str(HEALTH / "run.py"))
    results = json.loads((HEALTH / "results.json").read_text())
    assert list(results["collapse"]) == list(variants["COLLAPSE"])
    assert list(results["recipes"]) == list(variants["RECIPES"])
