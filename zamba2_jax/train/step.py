"""The training step: a pure function of a state and a batch."""

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import struct

from zamba2_jax.model import Zamba2, next_token_loss
from zamba2_jax.sharding import constrain_parameters
from zamba2_jax.train.data import Batch
from zamba2_jax.typing import Array, Float, Int


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
    model: Zamba2
    opt_state: optax.OptState


@struct.dataclass
class StepMetrics:
    """What one step saw.

    Attributes:
        loss: mean over the predicted tokens, in nats per token, before the update.
        grad_norm: global norm of the gradient, before clipping.
        learning_rate: of this step.
        tokens: tokens in the batch, without padding.
        skipped: as in `TrainState`, after the step.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    tokens: Int[Array, ""]
    skipped: Int[Array, ""]


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def init_state(model: Zamba2, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""

    def init(model: Zamba2) -> optax.OptState:
        return constrain_parameters(optimizer.init(model))

    step, skipped = jnp.zeros((2,), jnp.int32)
    return TrainState(step=step, skipped=skipped, model=model, opt_state=jax.jit(init)(model))


def train_step(
    state: TrainState, batch: Batch, *, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> tuple[TrainState, StepMetrics]:
    """One step of gradient descent.

    If the loss or the gradient is not finite, model and optimizer stay as they are and the step is counted as skipped.

    Args:
        state: where the run stands.
        batch: rows of packed documents.
        optimizer: for a learning rate of 1; see `AdamW.transformation`.
        schedule: the learning rate of a step, counted from 0.
    """
    (loss, _), gradient = jax.value_and_grad(_loss, has_aux=True)(state.model, batch)
    gradient = constrain_parameters(gradient)
    grad_norm, rate = optax.tree.norm(gradient), jnp.asarray(schedule(state.step))
    update, opt_state = optimizer.update(gradient, state.opt_state, state.model)
    model = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), state.model, update)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    def if_finite(new: Array, old: Array) -> Array:
        return jnp.where(finite, new, old)

    state = TrainState(
        step=state.step + 1,
        skipped=state.skipped + jnp.where(finite, 0, 1),
        model=constrain_parameters(jax.tree.map(if_finite, model, state.model)),
        opt_state=constrain_parameters(jax.tree.map(if_finite, opt_state, state.opt_state)),
    )
    tokens = (batch.segment_ids != 0).sum(dtype=jnp.int32)
    return state, StepMetrics(loss=loss, grad_norm=grad_norm, learning_rate=rate, tokens=tokens, skipped=state.skipped)


def compile_train_step(
    state: TrainState, batch: Batch, *, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> TrainStep:
    """`train_step` compiled for these shapes; it takes over the buffers of the states it is given."""
    step = partial(train_step, optimizer=optimizer, schedule=schedule)
    return jax.jit(step, donate_argnums=0).lower(state, batch).compile()


@jax.jit
def eval_step(model: Zamba2, batch: Batch) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The mean loss of a batch in nats per token, and the number of tokens predicted."""
    return _loss(model, batch)


def evaluate(model: Zamba2, batches: Iterable[Batch]) -> float:
    """The mean loss over all tokens predicted in the batches, in nats per token.

    Raises:
        ValueError: the batches hold nothing to predict.
    """
    results = jax.device_get([eval_step(model, batch) for batch in batches])
    count = sum(int(tokens) for _, tokens in results)
    if not count:
        raise ValueError("the held-out batches hold no token to predict")
    return sum(float(loss) * int(tokens) for loss, tokens in results) / count


def _loss(model: Zamba2, batch: Batch) -> tuple[Array, Array]:
    return next_token_loss(model, jnp.asarray(batch.tokens), jnp.asarray(batch.segment_ids))
