"""Compiles what inference runs for a slice, prefill or one step, and says what it takes there."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from zamba2_jax.choices import Implementation
from zamba2_jax.inference.decode import take_in
from zamba2_jax.models.base import LanguageModel
from zamba2_jax.models.cache import init_cache
from zamba2_jax.models.flops import prefill_flops, step_flops
from zamba2_jax.models.registry import init_model
from zamba2_jax.nn.cache import Cache
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.ops.attention import most_blocks
from zamba2_jax.ops.backend import Backend, default_backend
from zamba2_jax.parallel.mesh import abstract_on_mesh, bytes_per_device, check_mesh, parts
from zamba2_jax.plan.chips import Slice
from zamba2_jax.plan.estimate import Bounds, compile_for
from zamba2_jax.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferenceJob:
    """Prefill or a step to plan.

    Attributes:
        task: "prefill" takes prompts of `length` tokens into empty caches; "decode" is one step, after which the caches
            hold `length` tokens in every row.
        config: of the model.
        batch: rows, on all chips together.
        length: tokens of a row, and the capacity of its cache.
        dtype: of weights, caches and activations.
        scan: implementation of the scan of Mamba2; by default the fastest on the platform.

    Raises:
        ValueError: the task is not one of the two, or batch or length is below 1.
    """

    task: Literal["prefill", "decode"]
    config: ModelConfig
    batch: int
    length: int
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    scan: Implementation | None = None

    def __post_init__(self) -> None:
        if self.task not in ("prefill", "decode"):
            raise ValueError(f"task={self.task!r}: expected one of prefill, decode")
        for name in ("batch", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected an integer >= 1")

    @property
    def tokens(self) -> int:
        """What all rows take in together."""
        return self.batch * (self.length if self.task == "prefill" else 1)

    @property
    def flops(self) -> int:
        """Of all rows, by formula."""
        per_row = prefill_flops if self.task == "prefill" else step_flops
        return self.batch * per_row(self.config, self.length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferenceEstimate(Bounds):
    """What prefill or a step takes on every chip.

    Attributes:
        weights, caches: bytes that stay.
    """

    weights: int
    caches: int

    @property
    def stays(self) -> dict[str, int]:
        """Weights and caches."""
        return {"weights": self.weights, "caches": self.caches}


def check_inference_mesh(job: InferenceJob, mesh: Mesh) -> None:
    """Whether the mesh divides the model, and leaves rows whole.

    Raises:
        ValueError: it does not, or `data` has copies of the weights for which there are no rows.
    """
    check_mesh(job.config, mesh)
    sequence, copies = mesh.shape["sequence"], mesh.shape["data"]
    if sequence > 1:
        raise ValueError(f"mesh sequence={sequence}: expected 1 for {job.task}, as rows with a cache stay whole")
    if copies > 1 and job.batch % parts("batch", mesh):
        rows = f"mesh data={copies}, fsdp={mesh.shape['fsdp']}"
        raise ValueError(f"{rows} does not divide the batch, {job.batch}, and data alone copies the weights")


def estimate_inference(job: InferenceJob, slice: Slice, sizes: Mapping[str, int]) -> InferenceEstimate:
    """Compiles prefill or a step and reads off what it takes.

    The program is `inference.decode.prefill`'s or `decode_step`'s, in the memory of the caches that it is given; tokens
    are not chosen in it. How many tokens the rows have is a constant of it, so that loops over the cache are of a known
    length.

    Args:
        job: what is to run.
        slice: where.
        sizes: of the axes of the mesh, over all chips.

    Raises:
        ValueError: as in `check_inference_mesh`, or the mesh is not of all chips.
        DoesNotFitError: the compiler ran out of a chip's memory.
    """
    mesh = slice.mesh(**sizes)
    check_inference_mesh(job, mesh)
    with jax.set_mesh(mesh):
        model = abstract_on_mesh(
            jax.eval_shape(lambda: init_model(job.config, rngs=nnx.Rngs(0), dtype=job.dtype)), mesh
        )
        cache = _abstract_cache(job)
        compiled, seconds = compile_for(_lowered(job, model, _abstract_tokens(job, mesh), cache))
    return InferenceEstimate.read(
        compiled,
        slice,
        flops=job.flops,
        useful=job.flops,
        tokens=job.tokens,
        compile_time=seconds,
        unknown_trips=most_blocks(job.length, job.length) if job.task == "prefill" else 1,
        weights=bytes_per_device(model),
        caches=bytes_per_device(cache),
    )


def _abstract_cache(job: InferenceJob) -> Cache:
    """Shapes of the caches, placed as the compiler places them when they are made."""

    def make() -> Cache:
        return init_cache(job.config, job.batch, job.length, job.dtype)

    places = jax.jit(make).lower().compile().output_shardings
    return jax.tree.map(
        lambda of, place: jax.ShapeDtypeStruct(of.shape, of.dtype, sharding=place), jax.eval_shape(make), places
    )


def _abstract_tokens(job: InferenceJob, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The prompts, or the last token of every row; on every chip whole, as they come from the host."""
    shape = (job.batch, job.length) if job.task == "prefill" else (job.batch,)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))


def _lowered(job: InferenceJob, model: LanguageModel, tokens: jax.ShapeDtypeStruct, cache: Cache) -> jax.stages.Lowered:
    backend = default_backend(job.dtype)
    backend = backend if job.scan is None else dataclasses.replace(backend, scan=job.scan)
    before = 0 if job.task == "prefill" else job.length - 1

    def run(model: LanguageModel, tokens: Array, cache: Cache) -> tuple[Array, Cache]:
        return _run(job, model, tokens, cache.replace(lengths=jnp.full(job.batch, before, jnp.int32)), backend)

    return jax.jit(run, donate_argnames="cache").lower(model, tokens, cache)


def _run(job: InferenceJob, model: LanguageModel, tokens: Array, cache: Cache, backend: Backend) -> tuple[Array, Cache]:
    if job.task == "decode":
        return model.step(tokens, cache, backend=backend)
    return take_in(model, tokens, None, cache, backend=backend)
