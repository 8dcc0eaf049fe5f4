"""The meshes and remat policies worth trying for a step."""

import dataclasses
from collections.abc import Iterator

from zamba2_jax.models.flops import count_parameters
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.parallel.mesh import check_mesh
from zamba2_jax.plan.chips import Slice
from zamba2_jax.plan.estimate import Job

_STATE_BYTES = 12
"""Of a parameter and its two moments in float32."""


def candidates(job: Job, slice: Slice) -> Iterator[tuple[Job, dict[str, int]]]:
    """Jobs and sizes of the mesh's axes.

    For each size of `tensor` up to 8: parameters divided over all other chips, and over as few as let the state take
    half of a chip's memory, with copies of them over `data`. Where rows are fewer than chips, `sequence` divides them.
    Only what the mesh divides is given; each comes with the policies "matmuls" and "layer".
    """
    chips, rows = len(slice.devices), job.batch // job.step.microbatches
    for tensor in (size for size in (1, 2, 4, 8) if chips % size == 0):
        sequence = max(1, chips // tensor // rows)
        others = chips // tensor // sequence
        few = _fewest(job.config, slice, tensor, others)
        for fsdp in dict.fromkeys((others, few)):
            sizes = {"data": others // fsdp, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}
            if not _fits(job, slice, sizes):
                continue
            for remat in ("matmuls", "layer"):
                yield dataclasses.replace(job, step=dataclasses.replace(job.step, remat=remat)), sizes


def _fewest(config: ModelConfig, slice: Slice, tensor: int, others: int) -> int:
    """The smallest divisor of `others` over which the state takes half of a chip's memory at most."""
    state = _STATE_BYTES * sum(count_parameters(config).values()) / tensor
    divisors = [size for size in range(1, others + 1) if others % size == 0]
    return next((size for size in divisors if state / size <= slice.chip.memory / 2), others)


def _fits(job: Job, slice: Slice, sizes: dict[str, int]) -> bool:
    try:
        check_mesh(job.config, slice.mesh(**sizes), batch=job.batch // job.step.microbatches, length=job.length)
    except ValueError:
        return False
    return True
