import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zamba2_jax.data.batches import Batch
from zamba2_jax.nn.parameter import named_parameters, with_values
from zamba2_jax.parallel.mesh import make_mesh, shard_model
from zamba2_jax.train.optimizer import AdamW, Muon, ParameterGroup
from zamba2_jax.train.stacks import Stacking
from zamba2_jax.train.step import compile_train_step, evaluate, init_state, train_step

OPTIMIZER = AdamW(weight_decay=0.01).transformation()
RATE = 5e-3
SLOPE = 1e-7  # of the learning rate, so that steps can be told apart by it


@jax.jit
def step(state, batch):
    """A step that leaves the state it is given as it is."""
    return train_step(state, batch, optimizer=OPTIMIZER, schedule=lambda step: RATE + SLOPE * step)


def equal(tree, other):
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def test_a_step_descends_and_says_what_it_saw(model, batch):
    state, metrics = step(init_state(model, OPTIMIZER), batch)
    assert (int(metrics.tokens), int(metrics.skipped), int(state.step), int(state.skipped)) == (22, 0, 1, 0)
    np.testing.assert_allclose(metrics.loss, evaluate(model, [batch]).loss, rtol=1e-5)
    _, adam, _ = state.opt_state
    # The first mean is 1 - b1 of the clipped gradient. Adam's first update has size 1 wherever the gradient is not 0,
    # and goes against it.
    gradient = [np.asarray(mean) / 0.1 for mean in jax.tree.leaves(adam.mu)]
    norm = math.sqrt(sum(np.sum(leaf**2) for leaf in gradient))
    assert norm == pytest.approx(min(float(metrics.grad_norm), 1), rel=1e-4)
    pairs = zip(jax.tree.leaves(state.model), jax.tree.leaves(model), strict=True)
    moved = [np.asarray(new) - np.asarray(old) for new, old in pairs]
    assert all(0 < np.abs(change).max() < 1.1 * RATE for change in moved)
    assert sum(np.sum(change * leaf) for change, leaf in zip(moved, gradient, strict=True)) < 0


# Each of the factors differs within a stack.
GROUPS = (
    ParameterGroup(match="*", delay_steps=9, delay_power=2),
    ParameterGroup(match="layers.1.*", rate=0.5, delay_steps=0),
    ParameterGroup(match="*.in_bc", weight_decay=0.3),
    ParameterGroup(match="layers.0.mamba.in_bc", weight_decay=0.2),
)


@pytest.mark.parametrize(
    ("sizes", "config"), [({}, AdamW(weight_decay=0.01)), ({"fsdp": 2}, Muon(groups=GROUPS))], ids=str
)
def test_a_step_on_stacks_of_small_parameters_is_the_step(x64, model, batch, monkeypatch, sizes, config):
    optimizer = config.transformation()

    def run(state):
        return train_step(state, batch, optimizer=optimizer, schedule=lambda step: RATE)

    model = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model)
    state = dataclasses.replace(init_state(model, optimizer), step=jnp.int32(3))
    expected = jax.jit(run)(state)
    monkeypatch.setattr("zamba2_jax.train.stacks.SMALL", 500)
    stacking = Stacking(model)
    stacks = stacking.stack(state)
    assert {stack.ndim for stack in stacks.model.vectors.values()} == {2}
    assert {stack.ndim for stack in stacks.model.matrices.values()} == {3}
    assert stacks.model.large
    assert jax.tree.structure(stacking.split(stacks)) == jax.tree.structure(state)
    assert equal(stacking.split(stacks), state)

    mesh = make_mesh(**sizes)
    monkeypatch.setattr("zamba2_jax.train.step.platform", lambda: "tpu")
    with jax.set_mesh(mesh):
        state = dataclasses.replace(init_state(shard_model(model, mesh), optimizer), step=jnp.int32(3))
        result = jax.jit(run)(state)
    # Adam's first step divides a gradient by its size, and so amplifies rounding where it is small.
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


def test_the_learning_rate_is_that_of_the_step(model, batch):
    state = dataclasses.replace(init_state(model, OPTIMIZER), step=jnp.int32(20_000))
    for rate in (RATE + 0.002, RATE + 0.002 + SLOPE):
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics.learning_rate, rate, rtol=1e-6)


def test_the_compiled_step_is_the_step_and_takes_the_buffers(model, batch):
    state, other = init_state(model, OPTIMIZER), init_state(model, OPTIMIZER)
    compiled = compile_train_step(state, batch, optimizer=OPTIMIZER, schedule=lambda step: RATE + SLOPE * step)
    expected = step(other, batch)
    assert equal(compiled(state, batch), expected)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_overfits_one_batch(model, batch):
    state = init_state(model, OPTIMIZER)
    first = evaluate(model, [batch]).loss
    for _ in range(100):
        state, _ = step(state, batch)
    assert first > 3
    assert evaluate(state.model, [batch]).loss < 0.1


def test_a_run_is_deterministic(model, batch):
    ends = []
    for _ in range(2):
        state = init_state(model, OPTIMIZER)
        for _ in range(4):
            state, _ = step(state, batch)
        ends.append(state)
    assert equal(*ends)


def with_norm_scaled(model, factor):
    values = {name: parameter.get_value() for name, parameter in named_parameters(model).items()}
    return with_values(model, values | {"norm": values["norm"] * factor})


# NaN in the loss; then a finite loss whose gradient, of about 1e25, has a norm beyond float32.
@pytest.mark.parametrize(("factor", "finite_loss"), [(math.nan, False), (1e25, True)])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(model, batch, factor, finite_loss):
    good, _ = step(init_state(model, OPTIMIZER), batch)
    bad = dataclasses.replace(good, model=with_norm_scaled(good.model, factor))
    after, metrics = step(bad, batch)
    assert math.isfinite(metrics.loss) == finite_loss
    assert not math.isfinite(metrics.grad_norm)
    assert (int(after.step), int(after.skipped), int(metrics.skipped)) == (2, 1, 1)
    assert equal(after.model, bad.model)
    assert equal(after.opt_state, bad.opt_state)
    recovered, metrics = step(dataclasses.replace(after, model=good.model), batch)
    assert math.isfinite(metrics.loss)
    assert (int(recovered.step), int(recovered.skipped)) == (3, 1)
    assert not equal(recovered.model, good.model)


def test_evaluate_weighs_by_predicted_tokens(model, batch):
    parts = [Batch(tokens=batch.tokens[i : i + 1], segment_ids=batch.segment_ids[i : i + 1]) for i in (0, 1)]
    empty = Batch(tokens=np.zeros((1, 12), np.int32), segment_ids=np.zeros((1, 12), np.int32))
    assert evaluate(model, [*parts, empty]) == pytest.approx(evaluate(model, [batch]), rel=1e-5)
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate(model, [empty])
