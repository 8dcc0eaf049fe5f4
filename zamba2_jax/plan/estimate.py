"""Compiles the training step for a slice and says what it takes there."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Self

import jax

from zamba2_jax.models.flops import executed_flops, train_flops
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.parallel.mesh import bytes_per_device, check_mesh
from zamba2_jax.plan.chips import Slice
from zamba2_jax.plan.hlo import Traffic, traffic
from zamba2_jax.train.optimizer import AdamW
from zamba2_jax.train.step import StepConfig, abstract_batch, abstract_state, lower_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A training step to plan.

    Attributes:
        config: of the model, whose parameters are float32.
        batch: rows of one step, on all chips together.
        length: tokens of a row.
        step: how the step computes.
    """

    config: ModelConfig
    batch: int
    length: int
    step: StepConfig


class DoesNotFitError(ValueError):
    """The compiler found no way to run the step in the memory of a chip."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a program takes on every chip, at least. Sizes in bytes, times in seconds.

    The three times are lower bounds, each for its own resource at the data sheet's rate with the others free; the
    program takes the longest of them at least.

    Attributes:
        memory: of a chip.
        temporaries: what the program needs besides what stays, by the compiler.
        flops: by formula.
        traffic: bytes moved, from the compiled program.
        compute, memory_time, network: seconds at the peak rates.
        utilisation: useful FLOPs over those of the chips at peak in the longest time.
        tokens_per_second: of all chips, in that time.
        compile_time: seconds the compiler took, here.
        unknown_trips: how often each of `traffic.unknown_loops` was counted.
    """

    memory: float
    temporaries: int
    flops: float
    traffic: Traffic
    compute: float
    memory_time: float
    network: float
    utilisation: float
    tokens_per_second: float
    compile_time: float
    unknown_trips: int

    @classmethod
    def read(
        cls,
        compiled: jax.stages.Compiled,
        slice: Slice,
        *,
        flops: float,
        useful: float,
        tokens: int,
        compile_time: float,
        unknown_trips: int = 1,
        **stays: int,
    ) -> Self:
        """Reads a compiled program.

        Args:
            compiled: the program.
            slice: what it is compiled for.
            flops: of all chips.
            useful: of these, without what is computed twice.
            tokens: that all chips take in.
            compile_time, unknown_trips: as the attributes.
            stays: the attributes of a subclass.
        """
        memory, text = compiled.memory_analysis(), compiled.as_text()
        assert memory is not None
        assert text is not None
        chip, chips, moved = slice.chip, len(slice.devices), traffic(text, unknown_trips=unknown_trips)
        compute = flops / chips / chip.flops
        memory_time, network = moved.memory / chip.memory_bandwidth, sum(moved.sent.values()) / chip.link_bandwidth
        longest = max(compute, memory_time, network)
        return cls(
            memory=chip.memory,
            temporaries=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
            flops=flops / chips,
            traffic=moved,
            compute=compute,
            memory_time=memory_time,
            network=network,
            utilisation=useful / chips / chip.flops / longest,
            tokens_per_second=tokens / longest,
            compile_time=compile_time,
            unknown_trips=unknown_trips,
            **stays,
        )

    @property
    def stays(self) -> dict[str, int]:
        """Bytes on a chip by what is there before and after the program."""
        raise NotImplementedError

    @property
    def free(self) -> float:
        """Bytes left on a chip."""
        return self.memory - sum(self.stays.values()) - self.temporaries

    @property
    def seconds(self) -> float:
        """The longest of the three times."""
        return max(self.compute, self.memory_time, self.network)

    @property
    def bound(self) -> str:
        """What takes the longest: "compute", "memory" or "network"."""
        times = {"compute": self.compute, "memory": self.memory_time, "network": self.network}
        return max(times, key=lambda name: times[name])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate(Bounds):
    """What one training step takes on every chip.

    `flops` are those executed, with what is recomputed, see `models.flops.executed_flops`; `utilisation` is without.

    Attributes:
        parameters, optimizer: bytes that stay from step to step.
    """

    parameters: int
    optimizer: int

    @property
    def stays(self) -> dict[str, int]:
        """Parameters and optimizer."""
        return {"parameters": self.parameters, "optimizer": self.optimizer}


def estimate(job: Job, slice: Slice, sizes: Mapping[str, int]) -> Estimate:
    """Compiles the step and reads off what it takes.

    Args:
        job: the step.
        slice: where it is to run.
        sizes: of the axes of the mesh, over all chips.

    Raises:
        ValueError: the mesh does not divide the model, the batch or the slice.
        DoesNotFitError: the compiler ran out of a chip's memory.
    """
    mesh = slice.mesh(**sizes)
    check_mesh(job.config, mesh, batch=job.batch // job.step.microbatches, length=job.length)
    optimizer = AdamW().transformation()
    with jax.set_mesh(mesh):
        state = abstract_state(job.config, optimizer, mesh, "float32")
        batch = abstract_batch(job.batch, job.length, mesh)
        lowered = lower_train_step(state, batch, optimizer=optimizer, schedule=lambda step: 1e-4, config=job.step)
        compiled, seconds = compile_for(lowered)
    tokens = job.batch * job.length
    return Estimate.read(
        compiled,
        slice,
        flops=executed_flops(job.config, job.length, job.step.remat) * tokens,
        useful=train_flops(job.config, job.length) * tokens,
        tokens=tokens,
        compile_time=seconds,
        parameters=bytes_per_device(state.model),
        optimizer=bytes_per_device(state.opt_state),
    )


def compile_for(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float]:
    """The compiled program, and the seconds that it took.

    Raises:
        DoesNotFitError: the compiler ran out of a chip's memory.
    """
    begin = time.perf_counter()
    try:
        return lowered.compile(), time.perf_counter() - begin
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(str(error).splitlines()[0]) from error
