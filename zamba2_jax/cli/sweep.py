"""`zamba2 sweep`: variants of a training run, with seeds, from a file."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from zamba2_jax.cli.output import check_json_option, table_console
from zamba2_jax.cli.several import Several, values
from zamba2_jax.files import write_json


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Train variants of a run with several seeds, those of one shape together, and compare them.

    The file is one for `zamba2 train` with a table [sweep]: seeds, a grid of values, variants by name, a baseline; see
    docs/lab.md. The same command goes on with a sweep that was interrupted, and trains no run again that is done.
    """

    config: Path
    """The run and its variants, a TOML file."""
    output: Path | None = None
    """Directory of the sweep, in place of the file's."""
    overrides: Annotated[Several[str], tyro.conf.arg(name="set", metavar="KEY=VALUE ...")] = ()
    """Values in place of those in the file, for all variants, as phases.0.steps=100 or sweep.seeds=[0,1]."""
    metrics: Annotated[Several[str], tyro.conf.arg(metavar="PATTERN ...")] = ()
    """Which metrics to show, as "necessity.prose.all.*"; by default all losses and accuracies."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File to write the table to."""

    def run(self) -> int:
        """Trains and prints; returns 0, or 1 if all runs diverged.

        Raises:
            ValueError: an option, the file, a variant or the data is not valid.
            OSError: a file cannot be read or written.
        """
        from zamba2_jax.lab.sweep import load_sweep

        check_json_option(self.json)
        sweep = load_sweep(self.config, values(self.overrides), output=self.output)
        console = Console(highlight=False)
        result = sweep.run(console)
        diverged = [outcome for outcome in result.outcomes if outcome.status == "diverged"]
        for outcome in diverged:
            print(f"zamba2: {outcome.name} diverged: {outcome.error}", file=sys.stderr)
        if len(diverged) == len(result.outcomes):
            return 1
        table = result.table(metrics=values(self.metrics) or None)
        table_console().print(table)
        console.print(f"Written to {sweep.directory}", soft_wrap=True)
        if self.json is not None:
            write_json(self.json, table.as_dicts())
        return 0
