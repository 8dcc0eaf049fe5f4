"""The model against its own definition in numpy, and what must not change what it says."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import SMALL, TINY, as_dtype, assert_close, forward, normal, pad_rows, random_model, random_tokens
from tests.models import reference
from zamba2_jax import Backend, capture

VARIANTS = {
    "tiny": TINY,
    "biases, untied, clamped dt, no rope": dataclasses.replace(
        SMALL, add_bias_linear=True, tie_embeddings=False, time_step_limit=(0.05, 0.3), use_rope=False
    ),
    "fewer kv heads, other sizes": dataclasses.replace(
        SMALL, kv_heads=2, ngroups=3, d_conv=3, expand=3, rope_theta=100.0, rms_norm_eps=0.1
    ),
    "two blocks, one group, no q/k/v adapters": dataclasses.replace(
        SMALL, num_shared_blocks=2, ngroups=1, attention_adapters=False
    ),
}

COMPILED = "two blocks, one group, no q/k/v adapters"


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_reference(x64, variant):
    model = random_model(VARIANTS[variant], jnp.float64)
    tokens, positions = (
        random_tokens(model.config, 2, 9),
        jnp.array([[0, 1, 2, 3, 4, 5, 6, 7, 8], [5, 5, 9, 2] + [0] * 5]),
    )
    got = forward(model, tokens, positions=positions)
    expected = np.stack([reference.logits(model, *row) for row in zip(tokens, np.asarray(positions), strict=True)])
    assert_close(got, expected, 1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_all_calls_share_is_projected_once_and_what_a_tap_puts_in_its_place_each_time(x64, variant):
    model = random_model(VARIANTS[variant], jnp.float64)
    tokens, inputs = random_tokens(model.config, 2, 9), "layers.*.shared.input"
    plain, edited = (
        jax.jit(lambda model, tokens, edits=edits: capture(model, tokens, edits=edits)).trace(model, tokens)
        for edits in ({}, {inputs: lambda x: x + 0})
    )
    products = [str(trace.jaxpr).count("dot_general") for trace in (plain, edited)]
    assert products[1] == products[0] + 3 * model.config.num_calls
    if variant == COMPILED:
        plain, edited = (trace.lower().compile()(model, tokens) for trace in (plain, edited))
        assert_close(edited, plain, 1e-12)


def test_rows_longer_than_a_chunk_of_the_scan(x64):
    model = random_model(SMALL, jnp.float64)
    tokens = random_tokens(SMALL, 1, 150)
    assert_close(forward(model, tokens), forward(model, tokens, backend=Backend(scan="sequential")), 1e-12)


def test_padded_and_packed_rows_are_the_documents_alone(x64):
    model = random_model(SMALL, jnp.float64)
    a, b, c = np.split(np.asarray(random_tokens(SMALL, 10)), [5, 9])
    alone = forward(model, a[None])[0]
    tokens, ids = pad_rows([a, a, a, a, b, c], 14, lead=[0, 9, 3, 0, 0, 0])
    # Row 3 is a, padding, b and c; the last id is that of a once more.
    tokens = tokens.at[3, 7:11].set(b).at[3, 11:12].set(c)
    ids = ids.at[3, 7:11].set(2).at[3, 11:12].set(1)
    logits, seen, _ = jax.jit(partial(capture, select=("layers.0.shared.attention.k",)))(model, tokens, segment_ids=ids)
    assert np.isfinite(logits).all()
    for padded in (logits[0, :5], logits[1, 9:], logits[2, 3:8], logits[3, :5]):
        assert_close(padded, alone, 1e-12)
    assert_close(logits[3, 7:11], logits[4, :4], 1e-12)
    assert_close(logits[3, 11:12], logits[5, :1], 1e-12)
    # Keys are rotated by the position in the document; logits would be the same with any offset.
    keys = np.asarray(seen["layers.0.shared.attention.k"])
    assert_close((keys[1, 9:], keys[3, 7:11], keys[3, 11:12]), (keys[0, :5], keys[4, :4], keys[5, :1]), 1e-12)


def test_the_past_does_not_see_the_future():
    model, tokens = random_model(SMALL), random_tokens(SMALL, 2, 8)
    before, after = forward(model, tokens), forward(model, tokens.at[:, 5].add(1) % SMALL.vocab_size)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before - after)[:, 5:].max(axis=-1) > 1e-3).all()


def test_embeddings_in_place_of_tokens():
    model, tokens = random_model(SMALL), random_tokens(SMALL, 2, 8)
    np.testing.assert_array_equal(forward(model, inputs_embeds=model.embed[...][tokens]), forward(model, tokens))
    for both in ((None, None), (tokens, normal(2, 8, SMALL.hidden_size, dtype=jnp.float32))):
        with pytest.raises(ValueError, match="expected either tokens or inputs_embeds, and not both"):
            model(both[0], inputs_embeds=both[1])


def test_a_shared_block_is_stored_once_and_serves_all_its_calls():
    """Layers 0, 2 and 3 call blocks 0, 1 and 0."""
    config = dataclasses.replace(TINY, num_layers=4, hybrid_layer_ids=(0, 2, 3))
    model, tokens = random_model(config), random_tokens(config, 2, 8)
    per_block = 2 + 7 + 3  # norms, attention, MLP
    assert len(jax.tree.leaves(model.shared)) == 2 * per_block
    per_layer, per_call = 14, 6 + 3 + 1  # the latter: adapters of q, k, v and of the MLP; the linear map
    assert len(jax.tree.leaves(model)) == 2 + 4 * per_layer + 2 * per_block + 3 * per_call

    silenced = jax.jit(lambda model: capture(model, tokens, select=("layers.*.shared.output",)).values)
    for block, layers in ((0, {0, 3}), (1, {2})):
        down = model.shared[block].mlp.down
        kept = down[...]
        down[...] = jnp.zeros_like(kept)
        outputs = silenced(model)
        down[...] = kept
        assert {layer for layer in (0, 2, 3) if not outputs[f"layers.{layer}.shared.output"].any()} == layers


def test_bfloat16_is_near_float32():
    model, tokens = random_model(SMALL, jnp.bfloat16), random_tokens(SMALL, 2, 8)
    for path, leaf in jax.tree.leaves_with_path(model):
        assert leaf.dtype == (jnp.bfloat16 if leaf.ndim > 1 else jnp.float32), jax.tree_util.keystr(path)
    assert model.dtype == jnp.bfloat16
    logits = forward(model, tokens)
    assert logits.dtype == jnp.bfloat16
    # The weights are the same; about 30 roundings of 2^-9 on the way.
    assert_close(logits, forward(as_dtype(model, jnp.float32), tokens), 0.06)


def test_float32_is_near_float64(x64):
    model, tokens = random_model(SMALL, jnp.float64), random_tokens(SMALL, 2, 8)
    exact = forward(model, tokens)
    assert exact.dtype == jnp.float64
    logits = forward(as_dtype(model, jnp.float32), tokens)
    assert logits.dtype == jnp.float32
    assert_close(logits, as_dtype(exact, jnp.float64), 3e-6)
