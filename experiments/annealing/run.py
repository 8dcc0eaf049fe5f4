"""What the shape of the decay, the height of the re-warm-up and the replay share change in annealing; see README.md.

`python experiments/annealing/run.py` trains all variants; with `--quick` two small ones, to see that it runs. Finished
runs in `--runs` are not trained again.
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from zamba2_jax import fit, preset
from zamba2_jax.data.batches import Batch, held_out
from zamba2_jax.data.corpus import tokenize_embedded_corpus
from zamba2_jax.data.synthetic import open_synthetic
from zamba2_jax.evaluate import necessity
from zamba2_jax.lab.result import Outcome, Result
from zamba2_jax.train import recipe
from zamba2_jax.train.config import RunConfig
from zamba2_jax.train.schedule import boundaries, learning_rate

HERE = Path(__file__).parent
SMALL = {"vocab_size": 512, "hidden_size": 48, "mamba_heads": 4, "d_state": 16, "num_layers": 4,
         "hybrid_layer_ids": (1, 3), "ffn_size": 128, "adapter_rank": 4}  # fmt: skip
STEPS = (200, 60, 140)
LENGTH, ROWS = 64, 8
BASELINE = "linear from 0.75, replay 0.3"

SHAPES: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "cosine": {"decay": "cosine"},
    "exponential": {"decay": "exponential"},
    "1-sqrt": {"decay": "1-sqrt"},
    "constant at 0.75": {"decay": "constant"},
    "constant at 0.1": {"decay": "constant", "peak_fraction": 0.1, "warmup_steps": 0},
}
HEIGHTS: dict[str, dict[str, Any]] = {
    "from 0.1, no re-warm-up": {"peak_fraction": 0.1, "warmup_steps": 0},
    **{f"from {height:g}": {"peak_fraction": height} for height in (0.25, 1.5)},
}
SHARES: dict[str, dict[str, Any]] = {f"replay {share:g}": {"replay": share} for share in (0.0, 0.6)}
PARTS = {"shape of the decay": SHAPES, "height of the re-warm-up": HEIGHTS, "replay": SHARES}
NEEDED = ("all.attention", "hybrid.mixer", "plain.mixer")
METRICS = ("prose.loss", "code.loss", "copying.accuracy")


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two variants, one seed, a few steps")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each variant")
    parser.add_argument("--output", type=Path, default=HERE, help="directory for results.json and figure.png")
    parser.add_argument("--runs", type=Path, help="directory that keeps the runs, to go on from; none by default")
    options = parser.parse_args()
    if options.seeds < 1 or not options.output.is_dir():
        parser.error(f"--seeds {options.seeds} --output {options.output}: expected a number >= 1 and a directory")
    variants = {name: changes for part in PARTS.values() for name, changes in part.items()}
    steps, seeds, small = STEPS, options.seeds, SMALL
    if options.quick:
        variants = {name: variants[name] for name in (BASELINE, "1-sqrt")}
        steps, seeds = (3, 3, 4), 1
        small = SMALL | {"num_layers": 2, "hybrid_layer_ids": (1,), "num_shared_blocks": 1, "hidden_size": 32}
    configs = {name: run_config(small, steps, changes) for name, changes in variants.items()}
    with tempfile.TemporaryDirectory() as scratch:
        runs = options.runs or Path(scratch) / "runs"
        result = fit(configs, seeds=range(seeds), baseline=BASELINE, directory=runs)
        texts = {} if options.quick else held_out_rows(configs[BASELINE])
        write(result, sum(steps[:2]), texts, options.output)
    print(result.table(metrics=METRICS))


def run_config(model: dict[str, Any], steps: tuple[int, int, int], changes: dict[str, Any]) -> RunConfig:
    """The recipe's run with another annealing: `changes` are the replay share, or fields of its phase."""
    config = recipe.run_config(preset("zamba2-nano", **model), steps=steps, batch_size=ROWS, length=LENGTH)
    replay = {"replay": changes["replay"]} if "replay" in changes else {}
    *before, annealing = recipe.phases(steps, **replay)
    fields = {key: value for key, value in changes.items() if key != "replay"}
    phases = (*before, dataclasses.replace(annealing, **fields))
    evaluation = dataclasses.replace(config.evaluation, every=sum(steps))
    logging = dataclasses.replace(config.logging, health_every=sum(steps) // 5)
    return dataclasses.replace(config, phases=phases, evaluation=evaluation, logging=logging)


def write(result: Result, annealed_from: int, texts: Mapping[str, list[Batch]], directory: Path) -> None:
    """The numbers, with the needs of the baseline's models, and the picture; annealing begins at `annealed_from`."""
    values = {
        "metrics": METRICS,
        "before annealing": [before(outcome, annealed_from) for outcome in result[BASELINE]],
        "mean rates": {name: mean_rate(result[name][0].config) for name in result.variants},
        "table": result.table(metrics=METRICS).as_dicts(),
        "runs": [
            {
                "variant": outcome.variant,
                "seed": outcome.seed,
                "metrics": [outcome.metrics.get(metric) for metric in METRICS],
                "ratios": [round(ratio, 3) for ratio in outcome.ratios()],
            }
            for outcome in result.outcomes
        ],
        "needs of the baseline": [needs(outcome, texts) for outcome in result[BASELINE]],
    }
    (directory / "results.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    plot(result).savefig(directory / "figure.png")


def mean_rate(config: RunConfig) -> float:
    """Over the steps of annealing, as a fraction of the run's peak."""
    start, end = boundaries(config.phases)[-2:]
    return round(float(np.mean(jax.vmap(learning_rate(config.phases, 1.0))(np.arange(start, end)))), 4)


def before(outcome: Outcome, step: int) -> list[float]:
    """The metrics at a step where all sources were evaluated."""
    curves = [outcome.curve(metric) for metric in METRICS]
    return [float(values[steps == step][0]) for steps, values in curves]


def held_out_rows(config: RunConfig) -> dict[str, list[Batch]]:
    """The first 64 held-out rows of each text and of copying."""
    vocabulary = config.model.resolve().vocab_size
    corpus = tokenize_embedded_corpus(vocabulary)
    copying = open_synthetic(config.evaluation.sources["copying"], corpus.tokenizer, vocab_size=vocabulary)
    texts = {**corpus.held_out, "copying": copying}
    return {name: held_out(text, batch_size=32, length=LENGTH)[:2] for name, text in texts.items()}


def needs(outcome: Outcome, texts: Mapping[str, list[Batch]]) -> dict[str, dict[str, float]]:
    """What the loss on each text rises by with a part silenced; empty where the run diverged."""
    if outcome.status == "diverged":
        return {}
    model = outcome.model()
    return {
        name: {of.part.name: round(of.increase, 4) for of in necessity(model, rows, select=NEEDED).silenced}
        for name, rows in texts.items()
    }


def plot(result: Result) -> Figure:
    """For each metric what every variant is apart from the baseline, with the 95 % interval over seeds."""
    table = result.table(metrics=METRICS)
    groups = [[name for name in part if name in result.variants and name != BASELINE] for part in PARTS.values()]
    places, place = {}, 0.0
    for group in groups:
        for name in group:
            places[name] = place
            place += 1
        place += 0.7
    figure = Figure(figsize=(11, 1.4 + 0.3 * place), dpi=120, layout="constrained")
    for axis, metric in zip(figure.subplots(1, len(METRICS), sharey=True), METRICS, strict=True):
        for i, group in enumerate(groups):
            for name in group:
                found = table[name, metric].difference
                axis.plot([found.low, found.high], [places[name]] * 2, color=f"C{i}", linewidth=2)
                axis.plot(found.mean, places[name], "o", color=f"C{i}")
        axis.axvline(0, color="#55595e", linewidth=1)
        axis.set(xlabel=f"{metric}, less {table[BASELINE, metric].mean:.3f}", yticks=list(places.values()))
        axis.set_yticklabels(list(places))
        axis.grid(axis="x", linewidth=0.4)
    axis.invert_yaxis()
    figure.suptitle(f"Annealing: what is apart from {BASELINE!r}, 95 % intervals over paired seeds", fontsize=11)
    return figure


if __name__ == "__main__":
    main()
