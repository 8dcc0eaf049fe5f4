"""The meshes worth trying, and for a training step the remat policies."""

import dataclasses
from collections.abc import Callable, Iterator

import jax.numpy as jnp

from zamba2_jax.models.flops import count_parameters
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.parallel.mesh import check_mesh
from zamba2_jax.plan.chips import Slice
from zamba2_jax.plan.estimate import Job
from zamba2_jax.plan.inference import InferenceJob, check_inference_mesh

_STATE_BYTES = 12
"""Of a parameter and its two moments in float32."""


def inference_candidates(job: InferenceJob, slice: Slice) -> Iterator[dict[str, int]]:
    """Sizes of the mesh's axes for prefill or a step.

    For each size of `tensor` that divides the chips and the model: the weights divided over all other chips, and over
    as few as let them take half of a chip's memory, with copies of them over `data` where there are rows for these.
    """
    chips, itemsize = len(slice.devices), jnp.dtype(job.dtype).itemsize
    for tensor in (size for size in range(1, chips + 1) if chips % size == 0):
        others = chips // tensor
        few = _fewest(job.config, slice, tensor, others, itemsize)
        for fsdp in dict.fromkeys((few, others)):
            sizes = {"data": others // fsdp, "fsdp": fsdp, "tensor": tensor}
            if _is_valid(check_inference_mesh, job, slice.mesh(**sizes)):
                yield sizes


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
        few = _fewest(job.config, slice, tensor, others, _STATE_BYTES)
        for fsdp in dict.fromkeys((others, few)):
            sizes = {"data": others // fsdp, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}
            batch = job.batch // job.step.microbatches
            if not _is_valid(check_mesh, job.config, slice.mesh(**sizes), batch=batch, length=job.length):
                continue
            for remat in ("matmuls", "layer"):
                yield dataclasses.replace(job, step=dataclasses.replace(job.step, remat=remat)), sizes


def _fewest(config: ModelConfig, slice: Slice, tensor: int, others: int, parameter_bytes: int) -> int:
    """The smallest divisor of `others` over which the parameters take half of a chip's memory at most."""
    state = parameter_bytes * sum(count_parameters(config).values()) / tensor
    divisors = [size for size in range(1, others + 1) if others % size == 0]
    return next((size for size in divisors if state / size <= slice.chip.memory / 2), others)


def _is_valid(check: Callable[..., None], *arguments: object, **options: object) -> bool:
    try:
        check(*arguments, **options)
    except ValueError:
        return False
    return True
