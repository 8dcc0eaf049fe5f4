"""`zamba2 plan`: what training and inference take on chips that are not there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
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
    from zamba2_jax.plan.estimate import Bounds

    Planned = tuple[str, Callable[[], Bounds]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compile a step of training or inference for a slice of TPUs, without the TPUs, and say what it takes.

    Prints memory per chip, operations, bytes moved in memory and between chips, the time each of them takes at least
    and which is the longest: a bound from the compiler's program, not a measurement. Exits with 1 if the program does
    not fit. TPU topologies need the extra `tpu`, and minutes.
    """

    preset: str
    """The architecture, as zamba2-7b."""
    topology: str
    """Chip and shape of the slice, as v5e:16x16, v5p:4x4x4 or v6e:8x8; cpu:8 for eight CPU devices."""
    batch: int
    """Rows of a step, on all chips together."""
    task: Literal["train", "prefill", "decode"] = "train"
    """A training step; prompts of --seq tokens taken into empty caches; or one more token in every row, with which its
    cache holds --seq tokens."""
    seq: int = 4096
    """Tokens per row."""
    mesh: Annotated[str, tyro.conf.arg(metavar="AXIS=SIZE,...")] = ""
    """Sizes of data, fsdp, tensor and sequence; by default all chips in fsdp for training, else in tensor."""
    remat: Remat | None = None
    """What the forward pass of training keeps for the backward one; "layer" by default."""
    microbatches: int | None = None
    """Parts of the batch of training, run one after the other; 1 by default."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of matrices and activations, and for inference of the weights; the state of training is float32."""
    scan: Implementation | None = None
    """Implementation of the scan; by default the kernels that would run."""
    search: bool = False
    """Try meshes, and for training remat policies, and rank those that fit; --mesh and --remat are not read."""
    json: Path | None = None
    """Also write every number to this file."""

    def run(self) -> int:
        """Compiles and prints; 0 if the program fits, else 1.

        Raises:
            ValueError: an option is not valid, or the extra `tpu` is not installed.
        """
        import jax

        from zamba2_jax.plan.chips import describe_slice

        check_json_option(self.json)
        planned = self._training() if self.task == "train" else self._inference()
        jax.config.update("jax_platforms", "cpu")  # nothing runs: an accelerator that is there stays free
        slice = describe_slice(self.topology)
        if not self.topology.startswith("cpu:"):  # JAX cannot read programs back without the chips
            jax.config.update("jax_enable_compilation_cache", False)
        console = table_console()
        found = {}
        for label, compile in planned(slice):
            result = _try(compile, label, console)
            if result is not None:
                found[label] = result
        fitting = {label: result for label, result in found.items() if result.free >= 0}
        if self.search:
            console.print(_ranking(fitting))
        else:
            for label, result in found.items():
                console.print(_details(label, result, self._rows()))
        if self.json is not None:
            numbers = {label: dataclasses.asdict(result) for label, result in found.items()}
            write_json(self.json, numbers)
        return 0 if fitting else 1

    def _training(self) -> Callable[[Slice], Iterator[Planned]]:
        """Checks the options of a training step; what to compile for it on a slice."""
        from zamba2_jax.plan.estimate import Job, estimate
        from zamba2_jax.plan.search import candidates
        from zamba2_jax.train.step import StepConfig

        self._check_sizes()
        microbatches = 1 if self.microbatches is None else self.microbatches
        if self.batch % microbatches:
            raise ValueError(f"--microbatches {microbatches} does not divide --batch {self.batch}")
        step = StepConfig(
            microbatches=microbatches, remat=self.remat or "layer", compute_dtype=self.compute_dtype, scan=self.scan
        )
        job = Job(config=preset(self.preset), batch=self.batch, length=self.seq, step=step)

        def planned(slice: Slice) -> Iterator[Planned]:
            tried = candidates(job, slice) if self.search else [(job, self._mesh_sizes(slice, "fsdp"))]
            for each, sizes in tried:
                yield f"{_name(sizes)} remat={each.step.remat}", partial(estimate, each, slice, sizes)

        return planned

    def _inference(self) -> Callable[[Slice], Iterator[Planned]]:
        """The same of prefill or a decode step."""
        from zamba2_jax.plan.inference import InferenceJob, estimate_inference
        from zamba2_jax.plan.search import inference_candidates

        assert self.task != "train"
        self._check_sizes()
        for name in ("remat", "microbatches"):
            if getattr(self, name) is not None:
                raise ValueError(f"--{name} {getattr(self, name)}: expected only with --task train")
        job = InferenceJob(
            task=self.task,
            config=preset(self.preset),
            batch=self.batch,
            length=self.seq,
            dtype=self.compute_dtype,
            scan=self.scan,
        )

        def planned(slice: Slice) -> Iterator[Planned]:
            tried = inference_candidates(job, slice) if self.search else [self._mesh_sizes(slice, "tensor")]
            for sizes in tried:
                yield f"{_name(sizes)} {self.task}", partial(estimate_inference, job, slice, sizes)

        return planned

    def _check_sizes(self) -> None:
        for name in ("batch", "seq", "microbatches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: expected an integer >= 1")

    def _mesh_sizes(self, slice: Slice, default: str) -> dict[str, int]:
        return _sizes(self.mesh) if self.mesh else {default: len(slice.devices)}

    def _rows(self) -> Callable[[Bounds], dict[str, str]]:
        """What the longest of the times means for the task."""
        if self.task == "prefill":
            return lambda of: {"first token": f"after {of.seconds:.3g} s at best, of all {self.batch} rows"}
        if self.task == "decode":
            return lambda of: {"generation": f"{1 / of.seconds:.3g} tokens/s of a row at best"}
        return lambda of: {"utilisation": f"{of.utilisation:.0%} of the peak at best"}


def _try(compile: Callable[[], Bounds], label: str, console: Console) -> Bounds | None:
    from zamba2_jax.plan.estimate import DoesNotFitError

    try:
        with console.status(f"compiling {label}"):
            return compile()
    except DoesNotFitError as error:
        console.print(f"{label}: does not fit: {error}", markup=False, highlight=False, soft_wrap=True)
        return None


def _sizes(text: str) -> dict[str, int]:
    """The sizes of the mesh's axes."""
    from zamba2_jax.parallel.mesh import MESH_AXES

    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES or not size.isdecimal() or axis in sizes:
            raise ValueError(f"--mesh {text}: expected AXIS=SIZE,... with each of {', '.join(MESH_AXES)} once at most")
        sizes[axis] = int(size)
    return sizes


def _name(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one chip"


def _details(label: str, of: Bounds, task_rows: Callable[[Bounds], dict[str, str]]) -> Table:
    table = Table(title=label, show_header=False, title_justify="left")
    rows = {
        **{name: f"{size / 1e9:.2f} GB" for name, size in of.stays.items()},
        "temporaries": f"{of.temporaries / 1e9:.2f} GB",
        "free": f"{of.free / 1e9:.2f} GB of {of.memory / 1e9:g} GB, {of.free / of.memory:.0%}",
        "operations": f"{of.flops / 1e12:.3g} TFLOP, {of.compute:.3g} s",
        "memory traffic": f"{of.traffic.memory / 1e9:.3g} GB, {of.memory_time:.3g} s",
        "network traffic": f"{sum(of.traffic.sent.values()) / 1e9:.3g} GB, {of.network:.3g} s",
    }
    for kind, volume in of.traffic.sent.items():
        rows[f"  {kind}"] = f"{volume / 1e9:.3g} GB in {of.traffic.collectives[kind]} calls"
    rows["bound by"] = f"{of.bound}: {of.seconds:.3g} s, {of.tokens_per_second:,.0f} tokens/s at best"
    rows |= task_rows(of)
    if of.traffic.unknown_loops:
        rows["loops"] = f"{of.traffic.unknown_loops} of unknown length, counted as {of.unknown_trips} turns each"
    rows["compile time"] = f"{of.compile_time:.0f} s"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _ranking(found: dict[str, Bounds]) -> Table:
    table = Table("mesh", "free", "bound by", "seconds", "tokens/s", "utilisation")
    for label, of in sorted(found.items(), key=lambda item: item[1].seconds):
        free = f"{of.free / of.memory:.0%}"
        table.add_row(
            label, free, of.bound, f"{of.seconds:.3g}", f"{of.tokens_per_second:,.0f}", f"{of.utilisation:.0%}"
        )
    return table
