"""The training step: a pure function of a state and a batch."""

import contextlib
import ctypes
import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from jax.sharding import Mesh

from zamba2_jax.choices import Implementation, Remat
from zamba2_jax.data.batches import Batch
from zamba2_jax.models.base import LanguageModel
from zamba2_jax.models.layers import LayerOptions, are_alike, when
from zamba2_jax.models.registry import init_model
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.nn.tap import NO_TAP, Tap
from zamba2_jax.ops.attention import Implementation as AttentionImplementation
from zamba2_jax.ops.backend import Backend, default_backend
from zamba2_jax.ops.placement import compiled_apart, platform
from zamba2_jax.parallel.mesh import (
    abstract_on_mesh,
    batch_sharding,
    constrain,
    constrain_parameters,
    row_shares,
    summed_over_rows,
)
from zamba2_jax.train.health import CallSums, Health, call_sums, group_sizes
from zamba2_jax.train.objectives import loss_share, prediction_share, target_weights
from zamba2_jax.train.rounding import stored
from zamba2_jax.train.stacks import Stacking, leaves_of
from zamba2_jax.typing import Array, Bool, Float, Int, at_least_fp32

SCANNED_FROM = 12
"""Layers from which on they run by a scan unless told: below, unrolled layers compile in seconds and run faster.

Not on a GPU (docs/xla-notes.md: layers-one-by-one-on-gpu).
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How a training step computes; apart from `z_loss` and rounding, nothing here changes what it computes.

    Attributes:
        microbatches: parts of a batch that are run one after the other, their gradients summed in the parameters'
            dtype. Memory of activations falls with their number. Rows of part i are i, i + microbatches, and so on.
        remat: what the forward pass keeps for the backward one: "none" keeps all, "layer" the input of each layer,
            "matmuls" the results of its matrix products, or their sums, too; the rest is recomputed.
        scan_layers: runs repeated layers by a scan over their stacked parameters, which compile once. By default
            where there are at least `SCANNED_FROM` layers, all alike, but for a GPU.
        compute_dtype: of matrices and activations, with parameters, gradients and the optimizer in the dtype of the
            state; by default that of the state.
        z_loss: weight of the mean square of the logits' ln sum exp, which keeps it near 0 (arXiv:2204.02311).
        loss_chunk: positions of a row whose logits exist at a time.
        scan: implementation of the scan of Mamba2; by default the fastest on the platform, see `ops.ssd`.
        attention: implementation of attention; by default likewise, see `ops.causal_attention`.

    Raises:
        ValueError: a value breaks a rule; the message names field, value and rule.
    """

    microbatches: int = 1
    remat: Remat = "none"
    scan_layers: bool | None = None
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    z_loss: float = 0.0
    loss_chunk: int = 256
    scan: Implementation | None = None
    attention: AttentionImplementation | None = None

    def __post_init__(self) -> None:
        def one_of(values: tuple[object, ...]) -> str:
            return f"one of {', '.join(map(str, values))}"

        dtypes = None, "float32", "bfloat16"
        scans, attentions = ((None, *get_args(of)) for of in (Implementation, AttentionImplementation))
        rules = {
            "microbatches": (self.microbatches >= 1, "an integer >= 1"),
            "remat": (self.remat in get_args(Remat), one_of(get_args(Remat))),
            "compute_dtype": (self.compute_dtype in dtypes, one_of(dtypes)),
            "z_loss": (0 <= self.z_loss < math.inf, "a finite number >= 0"),
            "loss_chunk": (self.loss_chunk >= 1, "an integer >= 1"),
            "scan": (self.scan in scans, one_of(scans)),
            "attention": (self.attention in attentions, one_of(attentions)),
        }
        for field, (valid, rule) in rules.items():
            if not valid:
                raise ValueError(f"{field}={getattr(self, field)!r}: expected {rule}")


DEFAULT = StepConfig()


@struct.dataclass
class TrainState:
    """All that a run carries from one step to the next.

    Attributes:
        step: steps taken, skipped ones included; it fixes the learning rate and the next batch.
        skipped: steps that changed nothing because their loss or gradient was not finite.
        model: the parameters.
        opt_state: the optimizer's moments.
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    model: LanguageModel
    opt_state: optax.OptState


@struct.dataclass
class StepMetrics:
    """What one step saw.

    Attributes:
        loss: mean over the predicted tokens by their weights, in nats per token, before the update.
        grad_norm: global norm of the gradient, before clipping.
        learning_rate: of this step.
        tokens: tokens in the batch, without padding.
        skipped: as in `TrainState`, after the step.
        health: zeros in steps that do not measure it; None where no step does.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    tokens: Int[Array, ""]
    skipped: Int[Array, ""]
    health: Health | None = None


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def init_state(model: LanguageModel, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""

    def init(model: LanguageModel) -> optax.OptState:
        return constrain_parameters(optimizer.init(model))

    step, skipped = jnp.zeros((2,), jnp.int32)
    return TrainState(step=step, skipped=skipped, model=model, opt_state=jax.jit(init)(model))


def abstract_state(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, dtype: str) -> TrainState:
    """Shapes, dtypes and places of a training state; moments of the optimizer are where their parameters are."""
    state = jax.eval_shape(lambda: init_state(init_model(config, rngs=nnx.Rngs(0), dtype=dtype), optimizer))
    return abstract_on_mesh(state, mesh)


def abstract_batch(batch_size: int, length: int, mesh: Mesh) -> Batch:
    """The same of a batch of `batch_size` rows of `length` tokens."""
    ids = jax.ShapeDtypeStruct((batch_size, length), jnp.int32, sharding=batch_sharding(mesh))
    weights = jax.ShapeDtypeStruct(ids.shape, jnp.float32, sharding=ids.sharding)
    return Batch(tokens=cast(np.ndarray, ids), segment_ids=cast(np.ndarray, ids), weights=cast(np.ndarray, weights))


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: StepConfig = DEFAULT,
    health_every: int | None = None,
    tap: Tap = NO_TAP,
) -> tuple[TrainState, StepMetrics]:
    """One step of gradient descent.

    If the loss or the gradient is not finite, model and optimizer stay as they are and the step is counted as skipped.
    New values of parameters held in bfloat16 are rounded stochastically, see `train.rounding`.

    Args:
        state: where the run stands.
        batch: rows of packed documents.
        optimizer: for a learning rate of 1; see `Optimizer.transformation`. It is told the step, as the argument `step`
            of its update, and on a TPU given `Stacks`: what is not elementwise has to heed their first axes.
        schedule: the learning rate of a step, counted from 0.
        config: how it is computed.
        health_every: steps whose number, counted from 1, is a multiple of it measure `Health`; none by default.
        tap: its edits change what flows in the step, as an ablation does; see `nn.tap`. Layers then run one by one.

    Raises:
        ValueError: `config.microbatches` does not divide the rows of the batch, the mesh does not divide a part, or the
            tap selects values, or there is one with `config.scan_layers`.
    """
    tap, step = tap.edits(), state.step
    measured = None if health_every is None else (step + 1) % health_every == 0
    loss, gradient, calls = _observed_loss_and_gradient(state.model, batch, config, tap, measured)
    grad_norm, rate = optax.tree.norm(gradient), jnp.asarray(schedule(step))
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    def advance(gradient: Any, before: tuple[Any, optax.OptState]) -> tuple[Any, optax.OptState]:
        told = optax.with_extra_args_support(optimizer)
        update, opt_state = told.update(gradient, before[1], before[0], step=step)
        model = jax.tree.map(
            lambda p, u, leaf: stored(p - rate * u, p, leaf, step), before[0], update, leaves_of(before[0])
        )
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), (model, opt_state), before)

    before, stacking, health = (state.model, state.opt_state), Stacking(state.model), None
    if measured is not None:

        def of_groups(gradient: LanguageModel) -> tuple[dict[str, Array], ...]:
            # The update once more, so as not to hold it; in stacks, which compile faster.
            stacks, old = stacking.stack((gradient, before))
            return group_sizes(stacks, old[0], advance(stacks, old)[0])

        # docs/xla-notes.md: update-after-health
        gradient, sizes = jax.lax.optimization_barrier((gradient, when(measured, of_groups, gradient)))
        health = jax.tree.map(lambda array: constrain(array, *[None] * array.ndim), Health(calls, *sizes))
    if platform() == "tpu":  # docs/xla-notes.md: stacked-parameters
        model, opt_state = stacking.split(advance(*stacking.stack((gradient, before))))
    else:
        model, opt_state = advance(gradient, before)
    state = TrainState(
        step=state.step + 1,
        skipped=state.skipped + jnp.where(finite, 0, 1),
        model=constrain_parameters(model),
        opt_state=constrain_parameters(opt_state),
    )
    tokens = (batch.segment_ids != 0).sum(dtype=jnp.int32)
    metrics = StepMetrics(
        loss=loss, grad_norm=grad_norm, learning_rate=rate, tokens=tokens, skipped=state.skipped, health=health
    )
    return state, metrics


def compile_train_step(
    state: TrainState,
    batch: Batch,
    *,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: StepConfig = DEFAULT,
    health_every: int | None = None,
    tap: Tap = NO_TAP,
) -> TrainStep:
    """`train_step` compiled for these shapes; it takes over the buffers of the states it is given.

    Raises:
        ValueError: as `train_step`.
    """
    compiled = lower_train_step(
        state, batch, optimizer=optimizer, schedule=schedule, config=config, health_every=health_every, tap=tap
    ).compile()
    _return_freed_memory()
    return compiled


def lower_train_step(
    state: TrainState,
    batch: Batch,
    *,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: StepConfig = DEFAULT,
    health_every: int | None = None,
    tap: Tap = NO_TAP,
) -> jax.stages.Lowered:
    """`compile_train_step` before the compiler: for arrays, or their shapes and shardings."""
    step = partial(
        train_step, optimizer=optimizer, schedule=schedule, config=config, health_every=health_every, tap=tap
    )
    return jax.jit(step, donate_argnums=0).lower(state, batch)


def loss_and_gradient(
    model: LanguageModel, batch: Batch, config: StepConfig = DEFAULT, *, tap: Tap = NO_TAP
) -> tuple[Float[Array, ""], LanguageModel]:
    """The mean loss over the predicted tokens by their weights, without the z-loss, and the gradient with it.

    Arguments as of `train_step`.

    Raises:
        ValueError: as `train_step`.
    """
    return _observed_loss_and_gradient(model, batch, config, tap.edits(), None)[:2]


def _observed_loss_and_gradient(
    model: LanguageModel, batch: Batch, config: StepConfig, tap: Tap, measured: Bool[Array, ""] | None
) -> tuple[Array, LanguageModel, CallSums | None]:
    """Also what is measured of the calls of the shared blocks, if `measured` comes true; None if it is None."""
    rows, shares = len(batch.tokens), row_shares()
    if rows % (shares * config.microbatches):
        each = f" on each of {shares} devices" if shares > 1 else ""
        raise ValueError(f"microbatches={config.microbatches}{each} does not divide the batch of {rows} rows")

    def share(
        model: LanguageModel, batch: Batch, given: tuple[Array, Array | None]
    ) -> tuple[Array, LanguageModel, CallSums | None]:
        return _loss_and_gradient(model, batch, *given, config, tap)

    return summed_over_rows(share)(model, batch, (_total_weight(model, batch), measured))


def _loss_and_gradient(
    model: LanguageModel, batch: Batch, count: Array, measured: Array | None, config: StepConfig, tap: Tap
) -> tuple[Array, LanguageModel, CallSums | None]:
    """What a batch adds to the mean over weights of `count`, the gradient of that with the z-loss, and the calls'."""

    def of_part(part: Batch) -> tuple[Array, LanguageModel, CallSums | None]:
        (_, (loss, calls)), gradient = jax.value_and_grad(_loss_share, has_aux=True)(
            model, part, count, config, tap, measured
        )
        return loss, constrain_parameters(gradient), calls

    if config.microbatches == 1:
        return of_part(batch)

    parts = _split(batch, config.microbatches)

    def add(total: Any, i: Array) -> tuple[Any, None]:
        part = compiled_apart(lambda i: jax.tree.map(lambda array: array[i], parts), i)
        return jax.tree.map(jnp.add, total, of_part(part)), None

    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(of_part, batch))
    return jax.lax.scan(add, constrain_parameters(zeros), jnp.arange(config.microbatches))[0]


class Evaluation(NamedTuple):
    """What a model makes of held-out batches.

    Attributes:
        loss: mean over the predicted tokens by their weights, in nats per token.
        accuracy: of the predicted tokens with a weight above 0, the share that the model finds likeliest.
    """

    loss: float
    accuracy: float


@struct.dataclass
class BatchEvaluation:
    """What a model makes of one batch.

    Attributes:
        loss: mean over the predicted tokens by their weights, in nats per token.
        weight: the sum of the weights.
        hits: predicted tokens of a weight above 0 that the model finds likeliest.
        targets: predicted tokens of a weight above 0.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    hits: Int[Array, ""]
    targets: Int[Array, ""]


@partial(jax.jit, static_argnames="config")
def eval_step(model: LanguageModel, batch: Batch, config: StepConfig = DEFAULT) -> BatchEvaluation:
    """The loss of a batch, and what of it the model predicts."""
    h, weight = _run(model, batch, config, NO_TAP)[0], _total_weight(model, batch)
    loss, hits = prediction_share(h, model.output_matrix, *_arrays(batch), count=weight, chunk_size=config.loss_chunk)
    targets = target_weights(*_arrays(batch)) > 0
    return BatchEvaluation(loss=loss, weight=weight, hits=hits, targets=targets.sum())


def evaluate(model: LanguageModel, batches: Iterable[Batch], config: StepConfig = DEFAULT) -> Evaluation:
    """The mean loss over all tokens predicted in the batches, and how many of them the model finds likeliest.

    Args:
        model: the model.
        batches: each is run whole.
        config: how it is computed.

    Raises:
        ValueError: the batches hold nothing to predict.
    """
    results = jax.device_get([eval_step(model, batch, config) for batch in batches])
    weight, hits, targets = (sum(getattr(of, name).item() for of in results) for name in ("weight", "hits", "targets"))
    if not weight:
        raise ValueError("the held-out batches hold no token to predict")
    return Evaluation(sum(of.loss.item() * of.weight.item() for of in results) / weight, hits / targets)


def _loss_share(
    model: LanguageModel, batch: Batch, count: Array, config: StepConfig, tap: Tap, measured: Array | None
) -> tuple[Array, tuple[Array, CallSums | None]]:
    """What a batch adds to the mean over weights of `count`: with the z-loss; without it, and what the calls say."""
    h, calls = _run(model, batch, config, tap, measured)
    objective, loss = loss_share(
        h,
        model.output_matrix,
        *_arrays(batch),
        count=count,
        z_loss=config.z_loss,
        chunk_size=config.loss_chunk,
        backend=step_backend(model, config),
    )
    return objective, (loss, calls)


def _run(
    model: LanguageModel, batch: Batch, config: StepConfig, tap: Tap, measured: Array | None = None
) -> tuple[Array, CallSums | None]:
    """The model up to its head, as training runs it, and what is measured of its calls."""
    scan = config.scan_layers
    if scan is None:
        deep = model.config.num_layers >= SCANNED_FROM and are_alike(model.layers)
        scan = deep and platform() != "gpu" and not tap.is_active
    tokens, segment_ids, _ = _arrays(batch)
    calls = measured is not None and model.config.num_calls > 0
    run = model.run(
        tokens,
        segment_ids,
        tap=tap,
        backend=step_backend(model, config),
        options=LayerOptions(remat=config.remat, scan=scan, dtype=config.compute_dtype, training=True),
        observe=partial(call_sums, scale=model.config.attention_scale) if calls else None,
        observed=False if measured is None else measured,
    )
    return run.h, run.observed


def step_backend(model: LanguageModel, config: StepConfig) -> Backend:
    """How the ops of a step are computed."""
    backend = default_backend(config.compute_dtype or model.dtype)
    return dataclasses.replace(
        backend, scan=config.scan or backend.scan, attention=config.attention or backend.attention
    )


def _return_freed_memory() -> None:
    """Has glibc's malloc give back what is free (docs/xla-notes.md: freed-memory)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _total_weight(model: LanguageModel, batch: Batch) -> Array:
    """Of the tokens predicted; their number where the batch has no weights."""
    return target_weights(*_arrays(batch), at_least_fp32(model.dtype)).sum()


def _arrays(batch: Batch) -> tuple[Array, Array, Array | None]:
    """Tokens, segment ids and weights for JAX."""
    weights = None if batch.weights is None else jnp.asarray(batch.weights)
    return jnp.asarray(batch.tokens), jnp.asarray(batch.segment_ids), weights


def _split(batch: Batch, parts: int) -> Batch:
    """The rows in parts, [parts, rows, t], each of which takes as many rows from every device."""

    def split(array: Array) -> Array:
        rows = jnp.asarray(array).reshape(-1, parts, array.shape[1])
        return constrain(rows.swapaxes(0, 1), None, "batch", None)

    return jax.tree.map(split, batch)
