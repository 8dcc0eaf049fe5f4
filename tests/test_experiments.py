import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
HEALTH, ANNEALING = EXPERIMENTS / "health", EXPERIMENTS / "annealing"


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


def test_the_experiment_on_annealing_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--output", str(tmp_path)])
    runpy.run_path(str(ANNEALING / "run.py"), run_name="__main__")
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["runs"]) == 2
    (before,) = results["before annealing"]
    assert all(np.isfinite(before))
    assert results["runs"][0]["metrics"] != before
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_variants_of_annealing_differ_in_that_phase_alone():
    of = runpy.run_path(str(ANNEALING / "run.py"))
    variants = {name: changes for part in of["PARTS"].values() for name, changes in part.items()}
    configs = {name: of["run_config"](of["SMALL"], of["STEPS"], changes) for name, changes in variants.items()}
    baseline = configs[of["BASELINE"]]
    for config in configs.values():
        assert config.phases[:-1] == baseline.phases[:-1]
        assert config.phases[-1].steps == baseline.phases[-1].steps
        assert config.phases[-1].shares["copying"] == baseline.phases[-1].shares["copying"]
    assert len({str(config.phases) for config in configs.values()}) == len(configs)
    results = json.loads((ANNEALING / "results.json").read_text())
    assert list(dict.fromkeys(run["variant"] for run in results["runs"])) == list(variants)
