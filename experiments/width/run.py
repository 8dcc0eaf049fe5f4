"""Whether the best learning rate of one width is that of another; see README.md.

`python experiments/width/run.py` trains all; with `--quick` two small widths for a few steps, to see that it runs.
Finished runs in `--runs` are not trained again.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from zamba2_jax import fit, preset
from zamba2_jax.lab.protocols import text_run
from zamba2_jax.lab.result import Outcome
from zamba2_jax.train.config import RunConfig
from zamba2_jax.train.optimizer import AdamW, ParameterGroup

HERE = Path(__file__).parent
BASE, WIDTHS, STEPS = 64, (32, 64, 128), 100
RATES = {
    "Muon": tuple(2.5e-3 * 2**i for i in range(5)),
    "AdamW": tuple(1.25e-3 * 2**i for i in range(5)),
}
SCALINGS = ("one rate", "by width")
"""By width, matrices begin with a size of 1 / sqrt(width) and the rates of layers and blocks fall as 1 / width."""
METRIC = "prose.loss"


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two widths, one seed, a few steps")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each variant")
    parser.add_argument("--output", type=Path, default=HERE, help="directory for results.json and figure.png")
    parser.add_argument("--runs", type=Path, help="directory that keeps the runs, to go on from; none by default")
    options = parser.parse_args()
    if options.seeds < 1 or not options.output.is_dir():
        parser.error(f"--seeds {options.seeds} --output {options.output}: expected a number >= 1 and a directory")
    widths, steps, seeds, rates = WIDTHS, STEPS, range(options.seeds), RATES
    if options.quick:
        widths, steps, seeds, rates = (32, 64), 3, range(1), {"AdamW": RATES["AdamW"][:3]}
    cells = [
        (optimizer, scaling, width)
        for optimizer in rates
        for scaling in SCALINGS
        for width in widths
        if scaling == "one rate" or (optimizer == "AdamW" and width != BASE)
    ]
    curves = {}
    with tempfile.TemporaryDirectory() as scratch:
        for optimizer, scaling, width in cells:
            runs = {f"{rate:g}": run_config(optimizer, scaling, width, rate, steps) for rate in rates[optimizer]}
            name = f"{optimizer}, {scaling}, {width}"
            result = fit(runs, seeds=seeds, directory=(options.runs or Path(scratch)) / name)
            losses = [[loss(outcome) for outcome in result[rate]] for rate in runs]
            curves[name] = {
                "rates": list(rates[optimizer]),
                "losses": losses,
                "best": best_rates(np.array(rates[optimizer]), np.array(losses)),
                "ratios": [min(found), max(found)]
                if (found := [ratio for outcome in result.outcomes for ratio in outcome.ratios()])
                else [],
            }
    (options.output / "results.json").write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
    plot(curves, widths).savefig(options.output / "figure.png")
    for name, curve in curves.items():
        print(f"{name}: best at {curve['best']}")


def run_config(optimizer: str, scaling: str, width: int, rate: float, steps: int) -> RunConfig:
    """A run on text of the hybrid of a width; see `SCALINGS`."""
    fields: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": width, "num_layers": 4, "hybrid_layer_ids": (1, 3), "num_shared_blocks": 1,
        "mamba_heads": 4, "d_state": 16, "ffn_size": 2 * width, "adapter_rank": 4,
    }  # fmt: skip
    shrink = BASE / width if scaling == "by width" else 1.0
    fields["initializer_range"] = 0.05 * shrink**0.5
    config = text_run(preset("zamba2-nano", **fields), steps=steps, learning_rate=rate)
    if optimizer == "Muon":
        return config
    init_scale = {**config.init_scale, "embed": config.init_scale["embed"] * shrink**-0.5}  # which stays as it is
    groups = [dataclasses.replace(group, rate=(group.rate or 1.0) * shrink) for group in config.optimizer.groups]
    groups += [ParameterGroup(match="layers.*", rate=shrink)]
    return dataclasses.replace(config, optimizer=AdamW(groups=tuple(groups)), init_scale=init_scale)


def loss(outcome: Outcome) -> float | None:
    """On held-out prose; None where the run diverged."""
    return outcome.metrics.get(METRIC)


def best_rates(rates: np.ndarray, losses: np.ndarray) -> dict[str, Any]:
    """Where a parabola through the best rate and its neighbours is least, of each seed and as a mean.

    Args:
        rates: [r], each twice the one before.
        losses: [r, seeds]; NaN or None where a run diverged.

    Returns:
        The logarithm to base 2 of the best rate over the first one, by seeds; their mean, and how far the ends of its
        interval of 95 % are from it, None for one seed. Seeds whose best rate is the first or the last count as that.
    """
    found = []
    for column in np.asarray(losses, np.float64).T:
        at = int(np.nanargmin(column))
        around = column[at - 1 : at + 2] if 0 < at < len(rates) - 1 else np.array([np.nan])
        if np.isfinite(around).all():
            left, middle, right = around
            found.append(at + (left - right) / (2 * (left - 2 * middle + right)))
        else:
            found.append(float(at))
    mean, n = float(np.mean(found)), len(found)
    half = None if n < 2 else float(stats.t.ppf(0.975, n - 1) * np.std(found, ddof=1) / n**0.5)
    return {"doublings": found, "mean": mean, "interval": half, "rate": float(rates[0] * 2**mean)}


def plot(curves: dict[str, Any], widths: tuple[int, ...]) -> Figure:
    """Losses over the rate for each width, and the best rate over the width."""
    groups = list(dict.fromkeys(name.rpartition(", ")[0] for name in curves))
    figure = Figure(figsize=(4 * len(groups), 4), dpi=120, layout="constrained")
    for axis, group in zip(np.atleast_1d(figure.subplots(1, len(groups), sharey=True)), groups, strict=True):
        for i, width in enumerate(widths):
            # At the base width scaling changes nothing.
            curve = curves.get(f"{group}, {width}", curves[f"{group.split(', ')[0]}, one rate, {BASE}"])
            losses = np.array(curve["losses"], np.float64)
            axis.plot(curve["rates"], np.nanmean(losses, axis=1), color=f"C{i}", label=f"width {width}")
            axis.plot(curve["rates"], losses, ".", color=f"C{i}", alpha=0.4)
            axis.axvline(curve["best"]["rate"], color=f"C{i}", linestyle=":", linewidth=1)
        axis.set(xscale="log", xlabel="learning rate", title=group)
        axis.set_xticks(curve["rates"], [f"{rate:g}" for rate in curve["rates"]])
        axis.minorticks_off()
        axis.grid(linewidth=0.4)
    figure.axes[0].set(ylabel="held-out prose, nats per token")
    figure.axes[0].legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
