"""A picture of a run."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from zamba2_jax.files import write_atomically
from zamba2_jax.train.metrics import HEALTHY_RATIOS, EvalRecord, HealthRecord, Record, TrainRecord
from zamba2_jax.train.schedule import Phase, boundaries

_SHADES = ("#eef3fa", "#faf1e6")
_COLORS = ("#c44e2b", "#3a7d44", "#7a4fa3", "#b8860b", "#2f8f9d", "#8c564b")
_GRID = "#d5d8dc"


def plot_run(
    records: Sequence[Record],
    phases: Sequence[Phase],
    schedule: Callable[[np.ndarray], ArrayLike],
    path: Path,
    *,
    costs: Mapping[str, Mapping[str, float]],
) -> None:
    """Draws a run over its steps, the phases marked, and what the trained model needs.

    From top to bottom: the losses, in training and held out; the learning rate; what the shared blocks put out, against
    the residual stream; what the loss rises by when a part is silenced.

    Args:
        records: of the run, in order.
        phases: of the run.
        schedule: the learning rate of an array of steps.
        path: of the PNG to write.
        costs: by held-out text and name of a part, nats per token; see `evaluate.necessity`.
    """
    figure = Figure(figsize=(9, 11), dpi=130, layout="constrained")
    losses, rates, health, needs = figure.subplots(4, 1, height_ratios=(3, 0.8, 1.5, 2))
    every_step = np.arange(boundaries(phases)[-1])
    for axis in (rates, health):
        axis.sharex(losses)
    _plot_losses(losses, records)
    rates.plot(every_step, np.broadcast_to(schedule(every_step), every_step.shape), color="#55595e", linewidth=1.2)
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _plot_health(health, records)
    health.set_xlabel("step")
    losses.set_xlim(0, len(every_step))
    _mark_phases((losses, rates, health), phases)
    _plot_costs(needs, costs)
    write_atomically(path, lambda temporary: figure.savefig(temporary))


def _plot_losses(axis: Axes, records: Sequence[Record]) -> None:
    train = [record for record in records if isinstance(record, TrainRecord)]
    held_out: dict[str, list[EvalRecord]] = {}
    for record in records:
        if isinstance(record, EvalRecord):
            held_out.setdefault(record.held_out, []).append(record)
    steps = [record.step for record in train]
    axis.plot(steps, [record.loss for record in train], color="#4878a8", linewidth=1.2, label="training batches")
    for color, (name, evaluations) in zip(_COLORS, held_out.items(), strict=False):
        x, y = [record.step for record in evaluations], [record.loss for record in evaluations]
        axis.plot(x, y, color=color, marker="o", markersize=4, clip_on=False, label=f"held-out {name}")
    axis.set_ylabel("loss, nats per token")
    axis.legend(loc="upper right", framealpha=1)


def _plot_health(axis: Axes, records: Sequence[Record]) -> None:
    """The size of what each call of a shared block puts out; healthy between the dotted lines."""
    health = [record for record in records if isinstance(record, HealthRecord)]
    for i, layer in enumerate(health[0].calls if health else ()):
        ratios = [record.calls[layer].ratio for record in health]
        axis.plot([record.step for record in health], ratios, color=f"C{i % 10}", linewidth=1.2, label=layer)
    for bound in HEALTHY_RATIOS:
        axis.axhline(bound, color="#55595e", linestyle=":", linewidth=1)
    axis.set_yscale("log")
    axis.set_ylabel("shared output / residual")
    axis.legend(loc="lower right", framealpha=1, ncols=4, fontsize=8)


def _plot_costs(axis: Axes, costs: Mapping[str, Mapping[str, float]]) -> None:
    """Bars on a scale that is linear up to 0.01 nats and logarithmic from there on."""
    names = list(next(iter(costs.values()), {}))
    width = 0.8 / max(len(costs), 1)
    for i, (color, (text, of_text)) in enumerate(zip(_COLORS, costs.items(), strict=False)):
        places = np.arange(len(names)) + (i - (len(costs) - 1) / 2) * width
        axis.bar(places, [of_text[name] for name in names], width=width, color=color, label=text)
    axis.set_yscale("symlog", linthresh=0.01)
    axis.axhline(0, color="#55595e", linewidth=0.8)
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.set_ylabel("nats lost")
    axis.grid(axis="y", color=_GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_title("What the held-out loss rises by when a part is silenced", loc="left", fontsize=10)
    axis.legend(loc="upper left", framealpha=1, fontsize=8)


def _mark_phases(axes: Sequence[Axes], phases: Sequence[Phase]) -> None:
    """Shades each phase and writes its name and mixture over it."""
    for i, (phase, end) in enumerate(zip(phases, boundaries(phases), strict=True)):
        for axis in axes:
            axis.axvspan(end - phase.steps, end, color=_SHADES[i % 2], zorder=0)
            axis.grid(axis="y", color=_GRID, linewidth=0.6)
        shares = ",\n".join(f"{share:.0%} {name}" for name, share in phase.shares.items())
        middle, label = end - phase.steps / 2, f"{phase.name}:\n{shares}"
        place = axes[0].get_xaxis_transform()
        axes[0].text(middle, 1.01, label, ha="center", va="bottom", transform=place, fontsize=8)
