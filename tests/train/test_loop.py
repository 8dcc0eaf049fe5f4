import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import random_model
from tests.train.conftest import CONFIG
from zamba2_jax.checkpoint.store import restore_state, save_state
from zamba2_jax.data.batches import held_out
from zamba2_jax.data.documents import in_memory
from zamba2_jax.train.loop import DivergedError, Position, make_stages, train
from zamba2_jax.train.metrics import EvalRecord, HealthRecord, TrainRecord
from zamba2_jax.train.optimizer import AdamW
from zamba2_jax.train.schedule import Phase, learning_rate
from zamba2_jax.train.step import compile_train_step, init_state

PHASES = [
    Phase(name="first", steps=5, shares={"a": 1.0}, warmup_steps=2),
    Phase(name="second", steps=4, shares={"a": 0.5, "b": 0.5}, peak_fraction=0.75, decay="linear"),
]
OPTIMIZER = AdamW().transformation()


@pytest.fixture(scope="module")
def stages():
    random = np.random.default_rng(0)
    sources = {name: in_memory(random.integers(3, 32, size, dtype=np.int32) for size in (30, 9, 17)) for name in "ab"}
    return make_stages(PHASES, sources, batch_size=2, length=12, seed=0)


@pytest.fixture(scope="module")
def step(stages):
    state, batch = init_state(random_model(CONFIG), OPTIMIZER), next(iter(stages[0].batches))
    return compile_train_step(state, batch, optimizer=OPTIMIZER, schedule=learning_rate(PHASES, 1e-3), health_every=3)


def run(state, step, stages, **kwargs):
    records = []
    unseen = held_out(in_memory([np.arange(3, 30, dtype=np.int32)]), batch_size=2, length=12)
    options = {"held_out": {"h": unseen}, "log_every": 2, "eval_every": 3, "report": records.append, "health_every": 3}
    options |= kwargs
    return train(state, step, stages, **options), records


def test_records_cover_every_step(model, stages, step):
    state, records = run(init_state(model, OPTIMIZER), step, stages)
    assert int(state.step) == 9
    evaluations = [(r.phase, r.step) for r in records if isinstance(r, EvalRecord)]
    assert evaluations == [("first", 0), ("first", 3), ("first", 5), ("second", 8), ("second", 9)]
    logged = [(r.phase, r.step) for r in records if isinstance(r, TrainRecord)]
    assert logged == [("first", s) for s in (2, 3, 4, 5)] + [("second", s) for s in (6, 7, 8, 9)]
    measured = [record for record in records if isinstance(record, HealthRecord)]
    assert [(record.phase, record.step) for record in measured] == [("first", 3), ("second", 6), ("second", 9)]
    assert all(0 < record.calls["layers.1"].ratio < 100 and record.groups["mixers"].step > 0 for record in measured)
    seen = [batch for stage in stages for batch in itertools.islice(stage.batches, stage.phase.steps)]
    expected = sum((batch.segment_ids != 0).sum() for batch in seen)
    assert sum(r.tokens for r in records if isinstance(r, TrainRecord)) == expected
    rates = {r.step: r.learning_rate for r in records if isinstance(r, TrainRecord)}
    np.testing.assert_allclose([rates[s] for s in (2, 3, 7, 9)], [5e-4, 1e-3, 0.75e-3 * 0.75, 0.75e-3 / 4], rtol=1e-6)


@pytest.mark.parametrize("stop", [2, 5, 7])
def test_a_run_that_stops_and_goes_on_from_its_checkpoint_is_the_run_that_did_not(model, stages, step, tmp_path, stop):
    start = init_state(model, OPTIMIZER)
    whole, records = run(start, lambda state, batch: step(copy(state), batch), stages)
    positions = []

    def after_step(state, taken, position):
        if taken == stop:
            save_state(tmp_path / "checkpoint", state)
            positions.append(json.dumps(dataclasses.asdict(position())))
        return taken == stop

    stopped, before = run(start, lambda state, batch: step(copy(state), batch), stages, after_step=after_step)
    assert int(stopped.step) == stop
    restored = restore_state(tmp_path / "checkpoint", jax.eval_shape(lambda: start))
    resumed, rest = run(restored, step, stages, start=Position(**json.loads(positions[0])))
    assert [untimed(record) for record in before + rest] == [untimed(record) for record in records]
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def untimed(record):
    return dataclasses.replace(record, seconds=1, waited=1) if isinstance(record, TrainRecord) else record


def test_batches_that_are_left_out_are_taken_by_no_step(model, stages, step):
    """And those after them are, in order; a run that goes on with the same words leaves out no more."""
    taken, positions = [], []

    def watched(state, batch):
        taken.append(batch.tokens)
        return step(copy(state), batch)

    def after_step(state, number, position):
        if number == 3:
            positions.append((state, position()))
        return number == 3

    expected = [batch.tokens for batch in itertools.islice(stages[0].batches, 4, 9)]
    expected += [batch.tokens for batch in itertools.islice(stages[1].batches, 4)]
    run(init_state(model, OPTIMIZER), watched, stages, skip_to=("first", 4), after_step=after_step)
    ((state, position),) = positions
    assert (position.done, position.left_out) == (3, 4)
    run(state, watched, stages, skip_to=("first", 4), start=position)
    np.testing.assert_array_equal(taken, expected)


@pytest.mark.parametrize(("bad", "diverges"), [({2, 3, 4}, True), ({2, 3, 5, 6, 8, 9}, False)])
def test_skipped_steps_in_a_row_end_the_run(model, stages, step, bad, diverges):
    taken = []

    def spoiled(state, batch):
        taken.append(len(taken) + 1)
        state, metrics = step(state, batch)
        return state, metrics.replace(grad_norm=jnp.float32(jnp.inf if taken[-1] in bad else 1))

    start = init_state(model, OPTIMIZER)
    if diverges:
        with pytest.raises(DivergedError, match="3 steps in a row, the last of them step 4, had") as error:
            run(start, spoiled, stages, max_skipped=3, log_every=2, skip_to=("first", 2))
        assert (error.value.step, error.value.phase, error.value.batch) == (2, "first", 6)
    else:
        assert int(run(start, spoiled, stages, max_skipped=3, log_every=2)[0].step) == 9


def copy(state):
    return jax.tree.map(lambda array: jnp.asarray(np.array(array)), state)


def test_a_step_that_measures_no_health_is_found(model, stages, step):
    def blind(state, batch):
        state, metrics = step(state, batch)
        return state, metrics.replace(health=None)

    with pytest.raises(ValueError, match="the step measures no health"):
        run(init_state(model, OPTIMIZER), blind, stages)


@pytest.mark.parametrize("name", ["log_every", "eval_every", "health_every"])
def test_bad_interval(model, stages, step, name):
    with pytest.raises(ValueError, match=f"{name}=0: expected an integer >= 1"):
        run(init_state(model, OPTIMIZER), step, stages, **{name: 0})
