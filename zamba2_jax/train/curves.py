"""A picture of a run."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from zamba2_jax.files import write_atomically
from zamba2_jax.train.metrics import EvalRecord, Record, TrainRecord
from zamba2_jax.train.schedule import Phase, boundaries

_SHADES = ("#eef3fa", "#faf1e6")


def plot_curves(
    records: Sequence[Record], phases: Sequence[Phase], schedule: Callable[[np.ndarray], ArrayLike], path: Path
) -> None:
    """Draws the losses, in training and held out, and the learning rate over the steps, the phases marked.

    Args:
        records: of the run, in order.
        phases: of the run.
        schedule: the learning rate of an array of steps.
        path: of the PNG to write.
    """
    figure = Figure(figsize=(9, 6), dpi=130, layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    train = [record for record in records if isinstance(record, TrainRecord)]
    held_out: dict[str, list[EvalRecord]] = {}
    for record in records:
        if isinstance(record, EvalRecord):
            held_out.setdefault(record.held_out, []).append(record)
    steps = [record.step for record in train]
    losses.plot(steps, [record.loss for record in train], color="#4878a8", linewidth=1.2, label="training batches")
    for name, evaluations in held_out.items():
        x, y = [record.step for record in evaluations], [record.loss for record in evaluations]
        losses.plot(x, y, color="#c44e2b", marker="o", markersize=4, clip_on=False, label=f"held-out {name}")
    every_step = np.arange(boundaries(phases)[-1])
    rates.plot(every_step, np.broadcast_to(schedule(every_step), every_step.shape), color="#55595e", linewidth=1.2)
    _mark_phases((losses, rates), phases)
    losses.set_ylabel("loss, nats per token")
    losses.legend(loc="upper right", framealpha=1)
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rates.set_xlabel("step")
    rates.set_xlim(0, len(every_step))
    write_atomically(path, lambda temporary: figure.savefig(temporary))


def _mark_phases(axes: Sequence[Axes], phases: Sequence[Phase]) -> None:
    """Shades each phase and writes its name and mixture over it."""
    for i, (phase, end) in enumerate(zip(phases, boundaries(phases), strict=True)):
        for axis in axes:
            axis.axvspan(end - phase.steps, end, color=_SHADES[i % 2], zorder=0)
            axis.grid(axis="y", color="#d5d8dc", linewidth=0.6)
        shares = ", ".join(f"{share:.0%} {name}" for name, share in phase.shares.items())
        middle, label = end - phase.steps / 2, f"{phase.name}: {shares}"
        axes[0].text(middle, 1.01, label, ha="center", va="bottom", transform=axes[0].get_xaxis_transform())
