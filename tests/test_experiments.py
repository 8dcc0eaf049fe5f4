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


CLAIM = Path(__file__).parents[1] / "experiments" / "claim"


@pytest.mark.slow
def test_the_experiment_on_the_claim_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--output", str(tmp_path)])
    runpy.run_path(str(CLAIM / "run.py"), run_name="__main__")
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["counted"]) == {"zamba2-nano", "transformer-nano"}
    (measured,) = results["measured"].values()
    assert {"prompt of 32", "step of 1 x 32", "flops", "bandwidth"} == set(measured)
    (compiled,) = results["compiled"].values()
    assert compiled["tokens_per_second"] > 0
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_its_counts_are_those_by_hand():
    count = runpy.run_path(str(CLAIM / "run.py"))["count"]
    n, of = 4096 + 1000, count("mistral-7b-v0.1", 4096 + 1000)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    met = 32 * layer + 32000 * 4096
    assert (of.met, of.keys, of.stored) == (met, 4096 * 131072, 7241732096)
    # A token sees itself and at most 4,095 before it.
    seen = sum(min(i + 1, 4096) for i in range(n))
    head = 2 * 32000 * 4096
    assert of.causal == n * 2 * 32 * layer + head + 32 * 4 * 4096 * seen
    assert of.dense == n * 2 * 32 * layer + head + 32 * 4 * 4096 * n * 4096
    assert of.step == 2 * met + 32 * 4 * 4096 * 4096
    saved = json.loads((CLAIM / "results.json").read_text())["counted"]["zamba2-7b"]["2048"]
    assert saved == count("zamba2-7b", 2048)._asdict()


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


FAMILIES, SHARED_BLOCKS, WIDTH = (EXPERIMENTS / name for name in ("families", "shared_blocks", "width"))


def run_quickly(experiment, directory, monkeypatch):
    """What `--quick` writes."""
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--output", str(directory)])
    runpy.run_path(str(experiment / "run.py"), run_name="__main__")
    assert (directory / "figure.png").stat().st_size > 10_000
    return json.loads((directory / "results.json").read_text())


@pytest.mark.slow
def test_the_experiment_on_families_runs(monkeypatch, tmp_path):
    results = run_quickly(FAMILIES, tmp_path, monkeypatch)
    assert set(results["runs"]["lookup"]) == {"Zamba2/seed-0", "Mamba2, state 64/seed-0"}
    assert set(results["passkeys"]) == set(results["positions"]) == {"Zamba2/seed-0"}
    positions = results["positions"]["Zamba2/seed-0"]
    assert set(positions) == {"as trained", "8 x base", "long context"}
    assert positions["as trained"] != positions["8 x base"] != positions["long context"]
    assert np.isfinite(list(positions.values())).all()


def test_the_families_compared_take_like_flops_and_were_all_trained():
    of = runpy.run_path(str(FAMILIES / "run.py"))
    flops = [of["size"](model)["flops"] for model in of["MODELS"].values()]
    np.testing.assert_allclose(flops, flops[0], rtol=0.07)
    results = json.loads((FAMILIES / "results.json").read_text())
    for protocol in of["PROTOCOLS"]:
        models = {run.rpartition("/")[0] for run in results["runs"][protocol]}
        assert models == set(of["participants"](of["MODELS"], protocol))
        best = {model: of["best_rate"](rates) for model, rates in results["rates"].get(protocol, {}).items()}
        assert set(best.values()) <= set(of["RATES"])


@pytest.mark.slow
def test_the_experiment_on_shared_blocks_runs(monkeypatch, tmp_path):
    results = run_quickly(SHARED_BLOCKS, tmp_path, monkeypatch)
    assert len(results["runs"]["lookup"]) == len(results["runs"]["text"]) == 2
    assert results["runs"]["lookup"]["one block, two calls/seed-0"]["learned at"] is None


def test_the_experiment_on_shared_blocks_has_the_rates_that_were_found_and_all_variants():
    of = runpy.run_path(str(SHARED_BLOCKS / "run.py"))
    families, best = (
        json.loads((FAMILIES / "results.json").read_text()),
        runpy.run_path(str(FAMILIES / "run.py"))["best_rate"],
    )
    for protocol, rates in of["RATES"].items():
        assert rates == tuple(best(families["rates"][protocol][model]) for model in ("Zamba2", "Mamba2"))
    results = json.loads((SHARED_BLOCKS / "results.json").read_text())
    assert {run.rpartition("/")[0] for run in results["runs"]["text"]} == set(of["MODELS"]) == set(results["models"])


@pytest.mark.slow
def test_the_experiment_on_width_runs(monkeypatch, tmp_path):
    results = run_quickly(WIDTH, tmp_path, monkeypatch)
    assert set(results) == {"AdamW, one rate, 32", "AdamW, one rate, 64", "AdamW, by width, 32"}


def test_the_best_rate_is_that_of_the_parabola():
    best_rates = runpy.run_path(str(WIDTH / "run.py"))["best_rates"]
    rates, doublings = 1e-3 * 2.0 ** np.arange(5), np.arange(5)
    losses = np.stack([(doublings - 2.3) ** 2, 0.5 * (doublings - 1.9) ** 2 + 1, doublings], axis=1)
    losses[4, 1] = np.nan
    best = best_rates(rates, losses)
    np.testing.assert_allclose(best["doublings"], [2.3, 1.9, 0])
    # The interval of Student's t with two degrees of freedom.
    np.testing.assert_allclose(best["interval"], 4.302653 * np.std([2.3, 1.9, 0], ddof=1) / 3**0.5, rtol=1e-6)
    np.testing.assert_allclose(best["rate"], 1e-3 * 2**1.4)
