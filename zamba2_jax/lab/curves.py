"""The losses of many runs in one picture."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from zamba2_jax.files import write_atomically
from zamba2_jax.lab.runs import Run

_STYLES = ("-", "--", ":", "-.")
_COLORS = 10  # of matplotlib's cycle


def plot(runs: Sequence[Run], path: Path) -> None:
    """Draws the losses by tokens, in training and on each held-out set, a line for each run.

    Args:
        runs: to draw.
        path: of the file to write; its suffix says what, as .png.
    """
    sets = list(dict.fromkeys(name for run in runs for name in run.held_out))
    rows = -(-(1 + len(sets)) // 2)
    columns = min(2, 1 + len(sets))
    figure = Figure(figsize=(6.5 * columns + 2, 3.6 * rows), dpi=130, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    panels = dict(zip((None, *sets), axes, strict=False))
    for axis in axes[len(panels) :]:
        axis.remove()
    for name, axis in panels.items():
        axis.set_title("training" if name is None else f"held-out {name}", loc="left", fontsize=10)
        axis.set_xlabel("tokens")
        axis.set_ylabel("loss, nats per token")
        axis.grid(color="#d5d8dc", linewidth=0.6)
    looks = itertools.cycle(itertools.product(_STYLES, range(_COLORS)))
    for run, (style, color) in zip(runs, looks, strict=False):
        steps, tokens = list(run.tokens), list(run.tokens.values())
        for name, axis in panels.items():
            records = run.train if name is None else run.held_out.get(name, [])
            x = np.interp([record.step for record in records], steps, tokens)
            label = run.name if name is None else None
            y = [record.loss for record in records]
            axis.plot(x, y, color=f"C{color}", linestyle=style, linewidth=1.2, label=label)
    figure.legend(loc="outside right upper", fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary))
