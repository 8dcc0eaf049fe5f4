"""`zamba2 plan`: what a training step takes on chips that are not there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from zamba2_jax.choices import Implementation, Remat
from zamba2_jax.cli.output import check_json_option, table_console
from zamba2_jax.files import write_json
from zamba2_jax.models.registry import preset

if TYPE_CHECKING:
    from zamba2_jax.plan.chips import Slice
    from zamba2_jax.plan.estimate import Estimate, Job


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compile the training step for a slice of TPUs, without the TPUs, and say what it takes.

    Prints memory per chip, operations, bytes moved in memory and between chips, the time each of them takes at least
    and which is the longest. Exits with 1 if the step does not fit. TPU topologies need the extra `tpu`, and minutes.
    """

    preset: str
    """The architecture, as zamba2-7b."""
    topology: str
    """Chip and shape of the slice, as v5e:16x16, v5p:4x4x4 or v6e:8x8; cpu:8 for eight CPU devices."""
    batch: int
    """Rows of a step, on all chips together."""
    seq: int = 4096
    """Tokens per row."""
    mesh: Annotated[str, tyro.conf.arg(metavar="AXIS=SIZE,...")] = ""
    """Sizes of data, fsdp, tensor and sequence; all chips in fsdp by default."""
    remat: Remat = "layer"
    """What the forward pass keeps for the backward one."""
    microbatches: int = 1
    """Parts of the batch run one after the other."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of matrices and activations; the state is float32."""
    scan: Implementation | None = None
    """Implementation of the scan; by default the kernels that would run."""
    search: bool = False
    """Try meshes and remat policies and rank those that fit; --mesh and --remat are not read."""
    json: Path | None = None
    """Also write every number to this file."""

    def run(self) -> int:
        """Compiles and prints; 0 if the step fits, else 1.

        Raises:
            ValueError: an option is not valid, or the extra `tpu` is not installed.
        """
        import jax

        from zamba2_jax.plan.chips import describe_slice
        from zamba2_jax.plan.search import candidates

        check_json_option(self.json)
        job = self._job()
        jax.config.update("jax_platforms", "cpu")  # nothing runs: an accelerator that is there stays free
        slice = describe_slice(self.topology)
        console = table_console()
        tried = candidates(job, slice) if self.search else [(job, _sizes(self.mesh, len(slice.devices)))]
        found = {}
        for each, sizes in tried:
            label = f"{_name(sizes)} remat={each.step.remat}"
            result = _try(each, slice, sizes, label, console)
            if result is not None:
                found[label] = result
        fitting = {label: result for label, result in found.items() if result.free >= 0}
        if self.search:
            console.print(_ranking(fitting))
        else:
            for label, result in found.items():
                console.print(_details(label, result))
        if self.json is not None:
            numbers = {label: dataclasses.asdict(result) for label, result in found.items()}
            write_json(self.json, numbers)
        return 0 if fitting else 1

    def _job(self) -> Job:
        from zamba2_jax.plan.estimate import Job
        from zamba2_jax.train.step import StepConfig

        for name in ("batch", "seq"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: expected an integer >= 1")
        if self.batch % self.microbatches:
            raise ValueError(f"--microbatches {self.microbatches} does not divide --batch {self.batch}")
        step = StepConfig(
            microbatches=self.microbatches,
            remat=self.remat,
            compute_dtype=self.compute_dtype,
            scan=self.scan,
        )
        return Job(config=preset(self.preset), batch=self.batch, length=self.seq, step=step)


def _try(job: Job, slice: Slice, sizes: dict[str, int], label: str, console: Console) -> Estimate | None:
    from zamba2_jax.plan.estimate import DoesNotFitError, estimate

    try:
        with console.status(f"compiling {label}"):
            return estimate(job, slice, sizes)
    except DoesNotFitError as error:
        console.print(f"{label}: does not fit: {error}", markup=False, highlight=False, soft_wrap=True)
        return None


def _sizes(text: str, chips: int) -> dict[str, int]:
    """The sizes of the mesh's axes."""
    from zamba2_jax.parallel.mesh import MESH_AXES

    if not text:
        return {"fsdp": chips}
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES or not size.isdecimal() or axis in sizes:
            raise ValueError(f"--mesh {text}: expected AXIS=SIZE,... with each of {', '.join(MESH_AXES)} once at most")
        sizes[axis] = int(size)
    return sizes


def _name(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one chip"


def _details(label: str, of: Estimate) -> Table:
    table = Table(title=label, show_header=False, title_justify="left")
    rows = {
        "parameters": f"{of.parameters / 1e9:.2f} GB",
        "optimizer": f"{of.optimizer / 1e9:.2f} GB",
        "temporaries": f"{of.temporaries / 1e9:.2f} GB",
        "free": f"{of.free / 1e9:.2f} GB of {of.memory / 1e9:g} GB, {of.free / of.memory:.0%}",
        "operations": f"{of.flops / 1e12:.3g} TFLOP, {of.compute:.3g} s",
        "memory traffic": f"{of.traffic.memory / 1e9:.3g} GB, {of.memory_time:.3g} s",
        "network traffic": f"{sum(of.traffic.sent.values()) / 1e9:.3g} GB, {of.network:.3g} s",
    }
    for kind, volume in of.traffic.sent.items():
        rows[f"  {kind}"] = f"{volume / 1e9:.3g} GB in {of.traffic.collectives[kind]} calls"
    rows["bound by"] = f"{of.bound}: {of.seconds:.3g} s, {of.tokens_per_second:,.0f} tokens/s at best"
    rows["utilisation"] = f"{of.utilisation:.0%} of the peak at best"
    if of.traffic.unknown_loops:
        rows["loops"] = f"{of.traffic.unknown_loops} of unknown length, counted as one pass each"
    rows["compile time"] = f"{of.compile_time:.0f} s"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _ranking(found: dict[str, Estimate]) -> Table:
    table = Table("mesh", "free", "bound by", "seconds", "tokens/s", "utilisation")
    for label, of in sorted(found.items(), key=lambda item: item[1].seconds):
        free = f"{of.free / of.memory:.0%}"
        table.add_row(
            label, free, of.bound, f"{of.seconds:.3g}", f"{of.tokens_per_second:,.0f}", f"{of.utilisation:.0%}"
        )
    return table
