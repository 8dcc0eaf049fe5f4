"""`zamba2 runs`: training runs side by side."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from zamba2_jax.cli.output import check_json_option, table_console
from zamba2_jax.cli.several import Several, values
from zamba2_jax.files import write_json

_WIDEST = 10_000


@dataclasses.dataclass(frozen=True)
class Runs:
    """Compare training runs: settings, numbers, curves.

    A row for each run, finished or not: the settings in which the runs differ, how far it is, and its last numbers.
    """

    directories: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR...")]
    """Directories of runs, or directories that hold such at any depth."""
    where: Annotated[Several[str], tyro.conf.arg(metavar="KEY=VALUE ...")] = ()
    """Only runs with these settings, as learning_rate=1e-3 model.preset=zamba2-nano."""
    metrics: Annotated[Several[str], tyro.conf.arg(metavar="NAME ...")] = ()
    """The metrics to show, as train/loss eval/prose/accuracy; an unknown name lists all."""
    sort: str | None = None
    """A metric or a setting to sort by, from the smallest; by the runs' names by default."""
    baseline: str | None = None
    """The name of a run: what the others have above its numbers is shown in brackets."""
    plot: Path | None = None
    """Also draw the losses by tokens: a PNG."""
    json: Path | None = None
    """Also write all that is known of the runs to this file."""

    def run(self) -> int:
        """Reads and prints; returns 0.

        Raises:
            ValueError: an option or a file of a run is not valid.
            OSError: there is no run, or a file cannot be read or written.
        """
        from zamba2_jax.lab import runs as lab

        if not self.directories:
            raise ValueError("DIR is missing: expected directories of runs")
        check_json_option(self.json)
        if self.plot is not None and (self.plot.suffix != ".png" or not self.plot.parent.is_dir()):
            raise ValueError(f"--plot {self.plot}: expected a .png in a directory that is there")
        everything = lab.read_runs(self.directories)
        chosen = lab.select(everything, values(self.where))
        baseline = None if self.baseline is None else lab.by_name(everything, self.baseline, "--baseline")
        if baseline is not None and baseline not in chosen:
            chosen = [baseline, *chosen]
        if self.sort is not None:
            chosen = lab.sort(chosen, self.sort)
        table = lab.table(chosen, lab.metric_names(chosen, values(self.metrics)), baseline)
        console = table_console()
        if not console.is_terminal:  # what reads it may be as wide as the table
            console.width = max(console.width, Console(width=_WIDEST).measure(table).maximum)
        console.print(table)
        for run in chosen:
            for warning in run.warnings:
                console.print(f"{run.name}: {warning}", markup=False, highlight=False, soft_wrap=True)
        if self.json is not None:
            write_json(self.json, [lab.as_dict(run, baseline) for run in chosen])
        if self.plot is not None:
            from zamba2_jax.lab.curves import plot

            plot(chosen, self.plot)
        return 0
