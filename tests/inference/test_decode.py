import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import SMALL, assert_close, random_model, random_tokens
from zamba2_jax import cache_bytes, decode_step, fork, init_cache, prefill
from zamba2_jax.inference.decode import prefill_donated


@pytest.fixture(scope="module")
def model():
    return random_model(SMALL)


def test_a_cache_is_a_value(model):
    """Two branches from one cache; then one of them once more."""
    _, cache = prefill(model, random_tokens(SMALL, 2, 4), capacity=6)
    kept = jax.tree.map(np.array, cache)
    token, other = jnp.array([1, 2]), jnp.array([3, 4])
    logits, after = decode_step(model, token, cache)
    assert np.abs(decode_step(model, other, cache)[0] - logits).max() > 1e-3
    again, after_again = decode_step(model, token, cache)
    np.testing.assert_array_equal(again, logits)
    assert_close(after_again, after, 0)
    assert_close(cache, kept, 0)


def test_a_fork_goes_on_as_the_row_itself_does(model):
    """Two prompts, three ways on from each, in one batch; one of the six is what the row alone gives."""
    tokens = random_tokens(SMALL, 2, 4)
    _, cache = prefill(model, tokens, capacity=6)
    forks = fork(cache, 3)
    assert forks.lengths.tolist() == [4] * 6
    logits, _ = decode_step(model, jnp.arange(6), forks)
    for way in range(3):
        alone, _ = decode_step(model, jnp.arange(6)[way::3], cache)
        assert_close(logits[way::3], alone, 1e-5)
    with pytest.raises(ValueError, match="copies=0: expected at least 1"):
        fork(cache, 0)


def test_a_row_past_its_capacity_is_nan_and_others_are_not(model):
    tokens = random_tokens(SMALL, 2, 5)
    logits, cache = prefill(model, tokens, jnp.array([5, 3]), capacity=6)
    for taken in range(1, 4):
        _, before = logits, cache
        logits, cache = decode_step(model, tokens[:, 0], cache)
        assert np.isnan(logits[0]).all() == (5 + taken > 6)
        assert np.isfinite(logits[1]).all()
    logits, _ = prefill(model, tokens, jnp.array([1, 2]), before)
    assert np.isnan(logits).all(axis=-1).tolist() == [True, True]  # 7 + 1 and 5 + 2 of 6
    logits, _ = prefill(model, tokens, jnp.array([1, 1]), before)
    assert np.isnan(logits).all(axis=-1).tolist() == [True, False]  # 5 + 1 fit


def test_a_piece_of_a_prompt_takes_no_more_memory_in_a_longer_cache(model):
    """The cache is written in place, and what is needed beside it is the same for 2,048 tokens and for 32,768."""
    temporary = []
    for capacity in (2048, 32768):
        cache = jax.eval_shape(lambda capacity=capacity: init_cache(SMALL, 1, capacity))
        program = prefill_donated.lower(model, jnp.zeros((1, 64), jnp.int32), jnp.array([64]), cache).compile()
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes == cache_bytes(SMALL, 1, capacity).total
        temporary.append(memory.temp_size_in_bytes)
    assert temporary[0] == temporary[1]


def test_capacity_is_the_trained_context_by_default(model):
    shapes = jax.eval_shape(lambda model, tokens: prefill(model, tokens)[1], model, random_tokens(SMALL, 1, 4))
    assert shapes.capacity == SMALL.max_position_embeddings
    shapes = jax.eval_shape(lambda model, tokens: prefill(model, tokens)[1], model, random_tokens(SMALL, 1, 200))
    assert shapes.capacity == 200


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ((2, 0), {}, "tokens has shape (2, 0): expected at least one token"),
        ((2, 5), {"capacity": 4}, "5 tokens in a row: expected at most the capacity of the cache, 4"),
        ((2, 5), {"lengths": jnp.array([0, 5])}, "lengths=[0 5]: expected values in [1, 5]"),
        ((2, 5), {"lengths": jnp.array([1, 6])}, "lengths=[1 6]: expected values in [1, 5]"),
        ((2, 5), {"lengths": jnp.array([1, 2, 3])}, "lengths has shape (3,), expected (2,)"),
        ((2, 5), {"cache": init_cache(SMALL, 2, 9), "capacity": 9}, "capacity=9 is for a new cache"),
        ((2, 5), {"cache": init_cache(SMALL, 3, 9)}, "tokens has 2 rows, expected 3, as the cache"),
    ],
)
def test_prefill_names_wrong_arguments(unchecked, model, tokens, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prefill(model, jnp.zeros(tokens, jnp.int32), **options)
