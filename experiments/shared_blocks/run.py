"""How many shared blocks, called how often, with which adapters: what each is worth; see README.md.

`python experiments/shared_blocks/run.py` trains all; with `--quick` two small models for a few steps, to see that it
runs. Finished runs in `--runs` are not trained again.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from zamba2_jax import fit, preset
from zamba2_jax.lab.protocols import lookup_run, text_run
from zamba2_jax.lab.result import Outcome, Result
from zamba2_jax.models.flops import count_parameters, forward_flops, match
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.train.config import RunConfig

HERE = Path(__file__).parent
LENGTH = 128
BASELINE, TWO, NONE = "one block, two calls", "two blocks, a call each", "no block, eight layers"


def hybrid(**changes: Any) -> ModelConfig:
    """The baseline with other fields: four layers, before the second and the last of which one block is called."""
    fields = {"vocab_size": 512, "hidden_size": 64, "num_layers": 4, "hybrid_layer_ids": (1, 3), "num_shared_blocks": 1,
              "mamba_heads": 4, "d_state": 16, "ffn_size": 128, "adapter_rank": 4}  # fmt: skip
    return preset("zamba2-nano", **(fields | changes))


def parameters(model: ModelConfig) -> int:
    """Of all parts; a shared block counts once."""
    return sum(count_parameters(model).values())


MODELS: dict[str, ModelConfig] = {
    BASELINE: hybrid(),
    TWO: hybrid(num_shared_blocks=2),
    "one block with the parameters of two": match(
        hybrid(), parameters=parameters(hybrid(num_shared_blocks=2)), vary=("ffn_size",)
    ),
    "a call in each of three layers": hybrid(num_layers=3, hybrid_layer_ids=(0, 1, 2)),
    "one call, six layers": hybrid(num_layers=6, hybrid_layer_ids=(3,)),
    NONE: preset("mamba2-nano", vocab_size=512, hidden_size=64, num_layers=8, mamba_heads=4, d_state=16),
    "no adapters": hybrid(adapter_rank=0, attention_adapters=False),
    "adapters of rank 16": hybrid(adapter_rank=16),
}
PROTOCOLS: dict[str, tuple[Callable[..., RunConfig], int]] = {"lookup": (lookup_run, 600), "text": (text_run, 300)}
RATES = {"lookup": (1e-2, 1e-2), "text": (2e-2, 1e-2)}
"""Of hybrids and of Mamba2: those that ../families chooses for the baseline and for Mamba2."""
METRICS = ("copying.accuracy", "recall-12.accuracy", "prose.loss", "code.loss")


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two models, one seed, a few steps")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each model")
    parser.add_argument("--output", type=Path, default=HERE, help="directory for results.json and figure.png")
    parser.add_argument("--runs", type=Path, help="directory that keeps the runs, to go on from; none by default")
    options = parser.parse_args()
    if options.seeds < 1 or not options.output.is_dir():
        parser.error(f"--seeds {options.seeds} --output {options.output}: expected a number >= 1 and a directory")
    models, protocols, seeds = MODELS, PROTOCOLS, range(options.seeds)
    if options.quick:
        models = {name: models[name].with_num_layers(2) for name in (BASELINE, TWO)}
        protocols, seeds = {name: (run, 4) for name, (run, _) in protocols.items()}, range(1)
    with tempfile.TemporaryDirectory() as scratch:
        results = {
            name: fit(
                {
                    model: run(config, steps=steps, learning_rate=RATES[name][model == NONE])
                    for model, config in models.items()
                },
                seeds=seeds,
                baseline=BASELINE,
                necessity=("all.*",),
                directory=(options.runs or Path(scratch)) / name,
            )
            for name, (run, steps) in protocols.items()
        }
    values = {
        "models": {
            name: {"parameters": parameters(model), "flops": forward_flops(model, LENGTH).total}
            for name, model in models.items()
        },
        "table": [row for result in results.values() for row in result.table(metrics=("*",)).as_dicts()],
        "runs": {
            name: {
                outcome.name: {
                    **{metric: round(value, 4) for metric, value in outcome.metrics.items()},
                    "ratios": [round(ratio, 3) for ratio in outcome.ratios()],
                    "learned at": learned_at(outcome),
                }
                for outcome in result.outcomes
            }
            for name, result in results.items()
        },
    }
    (options.output / "results.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    plot(results).savefig(options.output / "figure.png")
    for result in results.values():
        print(result.table())


def learned_at(outcome: Outcome) -> int | None:
    """The step from which on the training loss is below 1 nat; None if it is not at the end."""
    steps, losses = outcome.curve("train.loss")
    above = np.flatnonzero(~(losses < 1))
    first = above[-1] + 1 if len(above) else 0
    return int(steps[first]) if first < len(steps) else None


def plot(results: dict[str, Result]) -> Figure:
    """Each metric of every variant: the seeds, and on the mean a line."""
    names = next(iter(results.values())).variants
    figure = Figure(figsize=(13, 1.2 + 0.35 * len(names)), dpi=120, layout="constrained")
    for axis, metric in zip(figure.subplots(1, len(METRICS), sharey=True), METRICS, strict=True):
        for place, name in enumerate(names):
            found = [
                outcome.metrics[metric]
                for result in results.values()
                for outcome in result[name]
                if metric in outcome.metrics
            ]
            axis.plot(found, [place] * len(found), "o", color="C0", alpha=0.5)
            if found:
                axis.plot(sum(found) / len(found), place, "|", color="black", markersize=14)
        axis.set(xlabel=metric, yticks=range(len(names)), yticklabels=names)
        axis.grid(axis="x", linewidth=0.4)
    axis.invert_yaxis()
    return figure


if __name__ == "__main__":
    main()
