"""`zamba2 check`: whether the devices that are here compute the right numbers, and how fast."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from zamba2_jax.cli.output import check_json_option, table_console
from zamba2_jax.files import finite, write_json

if TYPE_CHECKING:
    from zamba2_jax.check.compare import Finding

STYLES = {"right": "green", "slow": "yellow", "wrong": "red", "failed": "red"}


@dataclasses.dataclass(frozen=True)
class Check:
    """Run every kernel on the devices that are here, against an oracle and the clock.

    Kernels and plain XLA against the definitions in float64, with gradients; a training step over all devices of this
    process, and generation, against the reference; and how long each takes, beside plain XLA. An error is the norm of
    the difference over the norm of what is right. On a CPU, kernels for other devices are interpreted. The last line
    says what to set if a kernel is wrong or slow. Exits with 1 if a number is wrong.
    """

    quick: bool = False
    """Small shapes only, the default on a CPU."""
    preset: str | None = None
    """Also at the sizes of this architecture, one layer of it; zamba2-1.2b by default, but on a CPU."""
    distributed: bool = False
    """One of several processes that find each other by themselves, as for zamba2 train; each checks its own devices."""
    json: Path | None = None
    """Also write every number to this file."""

    def run(self) -> int:
        """Checks and prints; 0 if all numbers are right, else 1.

        Raises:
            ValueError: an option is not valid, or JAX sees no CPU beside the devices.
        """
        if self.quick and self.preset is not None:
            raise ValueError("--quick and --preset exclude each other")
        check_json_option(self.json)
        import jax

        from zamba2_jax.check.run import advice, checks, is_wrong, this_platform

        if self.distributed:
            jax.distributed.initialize()
        default = None if self.quick or this_platform() == "cpu" else "zamba2-1.2b"
        found: list[Finding] = []
        for name, check in checks(self.preset or default).items():
            print(f"checking {name}", file=sys.stderr, flush=True)  # a compiler may end the process
            found += check()
        console = table_console()
        console.print(_table(f"{_device()}, JAX {jax.__version__}", found))
        for finding in found:
            if finding.message:
                text = f"{finding.subject.name}, {finding.implementation}: {finding.message}"
                console.print(text, style="red", markup=False, soft_wrap=True)
        console.print(advice(found), markup=False, highlight=False, soft_wrap=True)
        if self.json is not None:
            rows = [dataclasses.asdict(finding) for finding in found]
            values = {"device": _device(), "jax": jax.__version__, "advice": advice(found), "rows": rows}
            write_json(self.json, finite(values))
        return 1 if any(map(is_wrong, found)) else 0


def _device() -> str:
    """The devices of this process, and which one it is of several."""
    import jax

    devices = jax.local_devices()
    text = f"{len(devices)} x {devices[0].device_kind}"
    several = jax.process_count() > 1
    return f"{text}, process {jax.process_index()} of {jax.process_count()}" if several else text


def _table(title: str, found: list[Finding]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("check", "shape", "dtype", "by"):
        table.add_column(column, overflow="fold")
    for column in ("error", "of", "allowed", "ms", "XLA's ms"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for finding in found:
        of, milliseconds = finding.subject, [_milliseconds(s) for s in (finding.seconds, finding.xla_seconds)]
        if finding.interpreted:
            milliseconds[0] = "interpreted"
        what = of.name, of.shape, of.dtype, finding.implementation
        numbers = f"{finding.error:.1e}", finding.result or "-", f"{finding.allowed:.1e}"
        table.add_row(*what, *numbers, *milliseconds, Text(finding.verdict, STYLES[finding.verdict]))
    return table


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3g}"
