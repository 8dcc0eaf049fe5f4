"""Compiles the training step for a slice and says what it takes there."""

import dataclasses
import math
import time
from collections.abc import Mapping

import jax

from zamba2_jax.models.flops import executed_flops, train_flops
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.parallel.mesh import check_mesh
from zamba2_jax.plan.chips import Chip, Slice
from zamba2_jax.plan.hlo import Traffic, traffic
from zamba2_jax.train.optimizer import AdamW
from zamba2_jax.train.step import StepConfig, TrainState, abstract_batch, abstract_state, lower_train_step


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
class Estimate:
    """What one step takes on every chip. Sizes in bytes, times in seconds.

    The three times are lower bounds, each for its own resource at the data sheet's rate with the others free; the step
    takes the longest of them at least.

    Attributes:
        parameters, optimizer: what stays from step to step.
        temporaries: what the step needs besides, by the compiler.
        memory: of a chip.
        flops: executed, with what is recomputed; by formula, see `models.flops.executed_flops`.
        traffic: bytes moved, from the compiled program.
        compute, memory_time, network: seconds at the peak rates.
        utilisation: model FLOPs, without what is recomputed, over those of the chips at peak in the longest time.
        tokens_per_second: of all chips, in that time.
        compile_time: seconds the compiler took, here.
    """

    parameters: int
    optimizer: int
    temporaries: int
    memory: float
    flops: float
    traffic: Traffic
    compute: float
    memory_time: float
    network: float
    utilisation: float
    tokens_per_second: float
    compile_time: float

    @property
    def free(self) -> float:
        """Bytes left on a chip."""
        return self.memory - self.parameters - self.optimizer - self.temporaries

    @property
    def seconds(self) -> float:
        """The longest of the three times."""
        return max(self.compute, self.memory_time, self.network)

    @property
    def bound(self) -> str:
        """What takes the longest: "compute", "memory" or "network"."""
        times = {"compute": self.compute, "memory": self.memory_time, "network": self.network}
        return max(times, key=lambda name: times[name])


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
        begin = time.perf_counter()
        compiled = _compile(lowered)
        seconds = time.perf_counter() - begin
    return _summary(job, slice.chip, len(slice.devices), state, compiled, seconds)


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(str(error).splitlines()[0]) from error


def _summary(
    job: Job, chip: Chip, chips: int, state: TrainState, compiled: jax.stages.Compiled, seconds: float
) -> Estimate:
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    moved, tokens = traffic(text), job.batch * job.length
    flops = executed_flops(job.config, job.length, job.step.remat) * tokens / chips
    compute = flops / chip.flops
    memory_time, network = moved.memory / chip.memory_bandwidth, sum(moved.sent.values()) / chip.link_bandwidth
    longest = max(compute, memory_time, network)
    return Estimate(
        parameters=_bytes_per_chip(state.model),
        optimizer=_bytes_per_chip(state.opt_state),
        temporaries=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory=chip.memory,
        flops=flops,
        traffic=moved,
        compute=compute,
        memory_time=memory_time,
        network=network,
        utilisation=train_flops(job.config, job.length) * tokens / chips / chip.flops / longest,
        tokens_per_second=tokens / longest,
        compile_time=seconds,
    )


def _bytes_per_chip(tree: object) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
