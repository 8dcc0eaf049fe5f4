from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import SMALL, assert_close, forward, random_model, random_tokens
from zamba2_jax import Tap, capture, decode_step, edits_tap, generate, prefill, tap_names
from zamba2_jax.data.batches import Batch
from zamba2_jax.train.step import StepConfig, loss_and_gradient

LAYER = "input output mamba.input mamba.z mamba.x mamba.B mamba.C mamba.dt mamba.y mamba.output".split()
STATES = "mamba.conv_x_state mamba.conv_bc_state mamba.ssm_state".split()
ATTENTION = "attention.q attention.k attention.v attention.output".split()
SHARED = ["input", *ATTENTION, *"mlp.gate mlp.up mlp.inner mlp.output output".split()]


@pytest.fixture(scope="module")
def model():
    return random_model(SMALL)


@pytest.fixture(scope="module")
def tokens():
    return random_tokens(SMALL, 2, 8)


def test_names_and_shapes(model):
    names = {"embed", "final_norm", "logits"}
    names |= {f"layers.{layer}.{name}" for layer in range(3) for name in LAYER + STATES}
    names |= {f"layers.{layer}.shared.{name}" for layer in (0, 2) for name in SHARED}
    taps = tap_names(model)
    assert set(taps) == names
    assert taps["layers.0.shared.attention.q"].shape == (1, 1, 4, 12)
    assert taps["layers.1.mamba.ssm_state"].shape == (1, 6, 8, 10)


def test_capture_sees_what_flows_and_changes_nothing(model, tokens):
    logits, seen, _ = jax.jit(capture)(model, tokens)
    assert set(seen) == set(tap_names(model))
    # Not to the bit: compiled with more outputs, sums may be fused otherwise.
    assert_close(logits, forward(model, tokens), 1e-6)
    np.testing.assert_array_equal(seen["logits"], logits)
    np.testing.assert_array_equal(seen["embed"], model.embed[...][tokens])
    assert_close(seen["layers.0.output"], seen["embed"] + seen["layers.0.mamba.output"], 1e-6)
    np.testing.assert_array_equal(seen["layers.1.input"], seen["layers.0.output"])
    assert_close(seen["final_norm"] @ model.embed[...].T, logits, 1e-6)
    _, cache = prefill(model, tokens)
    for layer, state in enumerate(cache.layers):
        for name in ("conv_x", "conv_bc"):
            assert_close(getattr(state, name), seen[f"layers.{layer}.mamba.{name}_state"], 1e-5)
        assert_close(state.ssm, seen[f"layers.{layer}.mamba.ssm_state"], 1e-5)


def test_patterns_select_what_the_documentation_says(model, tokens):
    def selected(*select):
        return set(jax.eval_shape(partial(capture, select=select), model, tokens)[1])

    assert selected("*.attention.q") == {f"layers.{layer}.shared.attention.q" for layer in (0, 2)}
    assert selected("layers.?.output") == {f"layers.{layer}.output" for layer in range(3)}
    assert selected("layers.*.output") > {"layers.0.output", "layers.1.mamba.output", "layers.2.shared.mlp.output"}


def test_an_ablated_call_is_a_call_with_no_weights(model, tokens):
    """Of the two calls, one is silenced, the other not; in the model itself by its linear map."""
    edits = {"layers.2.shared.output": jnp.zeros_like}
    ablated, seen, _ = jax.jit(partial(capture, select=("*.shared.output",), edits=edits))(model, tokens)
    assert set(seen) == {"layers.0.shared.output", "layers.2.shared.output"}
    assert not seen["layers.2.shared.output"].any()  # what is captured is what the model goes on with
    assert seen["layers.0.shared.output"].any()

    linear = model.calls[1].linear
    kept = linear[...]
    linear[...] = jnp.zeros_like(kept)
    expected = forward(model, tokens)
    linear[...] = kept
    assert_close(ablated, expected, 1e-6)
    assert np.abs(ablated - forward(model, tokens)).max() > 0.1


def test_a_pattern_that_matches_nothing_is_an_error(model, tokens):
    with pytest.raises(ValueError, match=r"no tap matches \['layers\.1\.shared\.\*', 'nothing'\]"):
        jax.eval_shape(partial(capture, select=("*", "nothing"), edits={"layers.1.shared.*": jnp.abs}), model, tokens)


EDITS = {"layers.2.shared.output": jnp.zeros_like, "layers.*.mamba.x": lambda x: 0.9 * x}


def test_edits_hold_in_every_pass(x64):
    """Steps, prefill and training give what an edited full pass gives."""
    model, row = random_model(SMALL, jnp.float64), random_tokens(SMALL, 9)
    edited = jax.jit(partial(capture, select=(), edits=EDITS))(model, row[None]).logits
    assert np.abs(edited - forward(model, row[None])).max() > 0.1
    tap = edits_tap(model, EDITS)
    assert_close(forward(model, row[None], tap=tap), edited, 1e-12)

    last, cache = prefill(model, row[None, :4], capacity=9, tap=tap)
    assert_close(last[0], edited[0, 3], 1e-12)
    for i in range(4, 9):
        last, cache = decode_step(model, row[None, i], cache, tap=tap)
        assert_close(last[0], edited[0, i], 1e-12)

    log_p = jax.nn.log_softmax(edited[0, :-1])[jnp.arange(8), row[1:]]
    batch = Batch(tokens=row[None], segment_ids=jnp.ones((1, 9), int))
    for remat in ("none", "matmuls"):
        step = jax.jit(partial(loss_and_gradient, config=StepConfig(remat=remat), tap=tap))
        loss, gradient = step(model, batch)
        assert loss == pytest.approx(-float(log_p.mean()), rel=1e-12)
        assert not gradient.calls[1].linear[...].any()
        assert gradient.calls[0].linear[...].any()


def test_a_step_shows_what_a_full_pass_shows(x64):
    model, row = random_model(SMALL, jnp.float64), random_tokens(SMALL, 6)
    whole = jax.jit(capture)(model, row[None]).values
    _, cache = prefill(model, row[None, :5], capacity=6)
    step = jax.jit(capture)(model, row[None, 5], cache=cache)
    assert set(step.values) == set(whole)
    assert_close(step.values["layers.2.shared.attention.q"][:, 0], whole["layers.2.shared.attention.q"][:, 5], 1e-12)
    assert_close(step.values["layers.1.mamba.ssm_state"], whole["layers.1.mamba.ssm_state"], 1e-12)
    assert_close(step.logits, whole["logits"][:, 5], 1e-12)
    assert step.cache.lengths.tolist() == [6]


def test_generation_is_edited(model):
    prompt = random_tokens(SMALL, 5).tolist()
    (continued,) = generate(model, [prompt], 4, edits=EDITS)
    logits = jax.jit(partial(capture, select=(), edits=EDITS))(model, jnp.array([prompt + continued])).logits
    assert continued == logits[0, 4:-1].argmax(-1).tolist()


def test_what_a_tap_cannot_do_is_an_error(model):
    batch = Batch(tokens=random_tokens(SMALL, 1, 6), segment_ids=jnp.ones((1, 6), int))
    tap = edits_tap(model, EDITS)
    with pytest.raises(ValueError, match="scan=True with a tap: layers have no names in a scan"):
        loss_and_gradient(model, batch, StepConfig(scan_layers=True), tap=tap)
    with pytest.raises(ValueError, match=r"tap\.select is given: expected edits alone"):
        loss_and_gradient(model, batch, tap=Tap(select=lambda name: True))
    with pytest.raises(ValueError, match=r"tap\.select is given: expected edits alone"):
        jax.eval_shape(partial(model, tap=Tap(select=lambda name: True)), batch.tokens)
    with pytest.raises(ValueError, match="is_step with 6 tokens in a row: expected a cache and one token"):
        jax.eval_shape(lambda tokens: model.run(tokens, is_step=True).h, batch.tokens)
    with pytest.raises(ValueError, match=r"no tap matches \['nothing'\]"):
        generate(model, [[1, 2]], 1, edits={"nothing": jnp.zeros_like})
