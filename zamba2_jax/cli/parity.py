"""`zamba2 parity`: the numbers of this package against PyTorch's."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from zamba2_jax.cli.output import check_json_option, table_console
from zamba2_jax.cli.several import Several, values
from zamba2_jax.files import write_atomically
from zamba2_jax.models.registry import preset, read_config

if TYPE_CHECKING:
    from rich.status import Status

    from zamba2_jax.parity.case import Case
    from zamba2_jax.parity.check import Report
    from zamba2_jax.parity.evidence import Row


@dataclasses.dataclass(frozen=True)
class Parity:
    """Compare this package with PyTorch and both with a float64 oracle.

    Runs the same model on the same tokens in both frameworks and prints how far embeddings, layer outputs, states,
    keys and values, logits, loss, gradients and greedy tokens are apart, and a verdict. Exits with 1 if a limit is
    exceeded. Without --model or --preset it runs small random variants of every family. transformers 5 clamps the time
    step of Zamba2 at time_step_min in a full pass, which the released models were not trained with: it is run without.
    """

    model: Path | None = None
    """Checkpoint directory to compare on."""
    preset: str | None = None
    """Compare a full-size architecture with random weights, as zamba2-1.2b or mistral-7b-v0.1."""
    variants: Annotated[Several[str], tyro.conf.arg(metavar="NAME ...")] = ()
    """Small variants to run; all of all families by default. Unknown names list the known ones."""
    batch: int = 1
    """Rows, with --model or --preset."""
    seq: int = 128
    """Tokens per row, with --model or --preset."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What both sides compute in."""
    precision: Literal["highest", "default"] = "highest"
    """Of our float32 matrix products. On CPU, "default" is a tenth faster and sums as XLA does, 1.6 times less exactly
    than PyTorch's MKL."""
    gradients: bool = True
    """Compare gradients too; they take most of the time."""
    streaming: bool = False
    """Hold one layer at a time, for models that do not fit; with --model or --preset."""
    new_tokens: int = 16
    """Length of the greedy continuation; streaming compares the likeliest next tokens instead."""
    seed: int = 0
    """Seed of random weights and tokens."""
    json: Path | None = None
    """Also write every number to this file."""

    def run(self) -> int:
        """Compares and prints; 0 if all is within the limits, else 1.

        Raises:
            ValueError: an option is not valid, or the extra `parity` is not installed.
        """
        cases = self._cases()
        check_json_option(self.json)
        missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"parity needs {' and '.join(missing)}: pip install 'zamba2-jax[parity]'")
        console = table_console()
        reports = []
        for report in self._reports(cases):
            reports.append(report)
            if len(cases) == 1:
                console.print(_table(report.case, report.rows))
            console.print(_table(f"{report.case}, by kind", report.groups))
            _print_verdict(console, report)
        if self.json is not None:
            text = json.dumps([dataclasses.asdict(report) for report in reports], indent=1) + "\n"
            write_atomically(self.json, lambda path: path.write_text(text, encoding="utf-8"))
        failed = [report.case for report in reports if report.failures]
        if len(cases) > 1:
            console.print(f"{len(reports) - len(failed)} of {len(reports)} cases within the limits", style="bold")
        return 1 if failed else 0

    def _cases(self) -> list[Case]:
        from zamba2_jax.parity.case import Case
        from zamba2_jax.parity.variants import VARIANTS

        if self.model is not None and self.preset is not None:
            raise ValueError("--model and --preset exclude each other")
        names = values(self.variants)
        if names and (self.model or self.preset):
            raise ValueError("--variants excludes --model and --preset")
        for name, value in (("batch", self.batch), ("seq", self.seq), ("new-tokens", self.new_tokens)):
            if value < 1:
                raise ValueError(f"--{name} {value}: expected at least 1")
        if self.model is not None:
            config = read_config(self.model)
            return [Case(str(self.model), config, self.batch, self.seq)]
        if self.preset is not None:
            return [Case(self.preset, preset(self.preset), self.batch, self.seq)]
        if self.streaming:
            raise ValueError("--streaming needs --model or --preset")
        unknown = sorted(set(names) - set(VARIANTS))
        if unknown:
            raise ValueError(f"--variants {' '.join(unknown)}: unknown, expected some of {', '.join(VARIANTS)}")
        return [VARIANTS[name] for name in names or VARIANTS]

    def _reports(self, cases: list[Case]) -> Iterator[Report]:
        from zamba2_jax.parity.check import check
        from zamba2_jax.parity.streaming import check_streaming

        for case in cases:
            with Console(file=sys.stderr).status(case.name) as status:

                def progress(line: str, case: Case = case, status: Status = status) -> None:
                    status.update(f"{case.name}: {line}")

                run = check_streaming if self.streaming else partial(check, new_tokens=self.new_tokens)
                report = run(
                    case,
                    self.model,
                    dtype=self.dtype,
                    precision=self.precision,
                    gradients=self.gradients,
                    seed=self.seed,
                    progress=progress,
                )
            yield report


def _table(title: str, rows: Iterable[Row]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", overflow="fold")
    for column in ("max |Δ|", "relative Δ", "ours vs float64", "PyTorch vs float64", "ours / PyTorch"):
        table.add_column(column, justify="right")
    for row in rows:
        if row.group == "greedy":
            table.add_row("greedy tokens", f"{row.max_error:.0%} differ")
            continue
        ratio = f"{row.our_error / row.torch_error:.2f}" if row.torch_error else "-"
        errors = (row.max_error, row.relative, row.our_error, row.torch_error)
        table.add_row(row.name, *(f"{error:.1e}" for error in errors), ratio)
    return table


def _print_verdict(console: Console, report: Report) -> None:
    if not report.failures:
        console.print(f"{report.case}: within the limits\n", style="green", soft_wrap=True)
        return
    console.print(f"{report.case}: beyond the limits", style="red", soft_wrap=True)
    for failure in report.failures:
        console.print(f"  {failure}", style="red", soft_wrap=True)
