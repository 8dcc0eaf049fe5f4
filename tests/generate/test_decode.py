import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import SMALL, assert_close, forward, random_model, random_tokens
from zamba2_jax import decode_step, generate, init_cache, prefill


@pytest.fixture(scope="module")
def model():
    return random_model(SMALL)


def test_greedy_is_the_likeliest_token_of_full_passes(model):
    """Prompts of unlike lengths in one batch."""
    tokens = np.asarray(random_tokens(SMALL, 3, 5 + 6))
    lengths, new = np.array([5, 1, 3]), 6
    prompts = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    expected = tokens.copy()
    for i in range(new):  # what stands right of a token does not change its logits
        last = np.asarray(forward(model, jnp.asarray(expected)))[range(3), lengths + i - 1]
        expected[range(3), lengths + i] = last.argmax(axis=-1)
    expected = [row[length : length + new].tolist() for row, length in zip(expected, lengths, strict=True)]
    assert generate(model, prompts, new) == expected
    assert len({tuple(row) for row in expected}) == 3


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


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts is empty"),
        ([[1], []], {}, "prompt 1 is empty, expected at least one token"),
        ([[1], [2, 32]], {}, "prompt 1 holds token 32, expected ids in [0, 32)"),
        ([[-1]], {}, "prompt 0 holds token -1, expected ids in [0, 32)"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0: expected at least 1"),
        ([[1]], {"temperature": -0.5}, "temperature=-0.5: expected 0 or more"),
        ([[1]], {"temperature": float("nan")}, "temperature=nan: expected 0 or more"),
    ],
)
def test_generate_names_wrong_arguments(model, prompts, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(model, prompts, **{"max_new_tokens": 3, **options})


def test_sampling_follows_the_softmax_at_a_temperature(model):
    """4000 draws of one token. A frequency has a standard error of sqrt(p (1 - p) / 4000)."""
    draws, temperature = 4000, 8.0
    logits = np.asarray(forward(model, jnp.array([[3, 5]]))[0, -1], np.float64)

    def deviation(temperature):
        """In standard errors, the largest over tokens that are expected five times or more."""
        p = np.asarray(jax.nn.softmax(logits / temperature))
        error = np.abs(frequency - p) / np.sqrt(p * (1 - p) / draws)
        return error[p * draws >= 5].max()

    sampled = np.ravel(generate(model, [[3, 5]] * draws, 1, temperature=temperature))
    frequency = np.bincount(sampled, minlength=SMALL.vocab_size) / draws
    assert deviation(temperature) < 4.5  # 32 tokens, once in 5000 seeds
    assert deviation(temperature * 1.2) > 6
    assert deviation(temperature / 1.2) > 6


def test_sampling_is_fixed_by_its_seed(model):
    sample = [generate(model, [[3, 5]], 8, temperature=20.0, seed=seed) for seed in (0, 0, 1)]
    assert sample[0] == sample[1] != sample[2]
    assert len(set(sample[0][0])) > 3  # a new key at every step
