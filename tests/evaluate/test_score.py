import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import random_model, random_tokens
from tests.inference.models import LENGTH, UNTIED, Letters, greedy, log_probabilities
from zamba2_jax import init_cache, score
from zamba2_jax.evaluate.score import POSITIONS, _score_piece, score_tokens


@pytest.fixture(scope="module")
def model():
    return random_model(UNTIED)


def test_scores_are_those_of_full_passes(model):
    """Ragged rows, more than a batch, up to three chunks; one token has nothing to predict."""
    rows = [random_tokens(UNTIED, length, seed=length).tolist() for length in (7, LENGTH, 1, 20, 2)]
    for row, found in zip(rows, score(model, rows, batch=2, chunk=16), strict=True):
        expected = log_probabilities(model, row)[range(len(row) - 1), row[1:]]
        np.testing.assert_allclose(found, expected, atol=2e-5)
    assert score(model, []) == []


def test_strings_are_scored_as_their_tokens(model):
    rows = [random_tokens(UNTIED, length, seed=length).tolist() for length in (7, 5)]
    texts = [Letters().decode(row) for row in rows]
    for found, expected in zip(score(model, texts, tokenizer=Letters()), score(model, rows), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_likeliest_tokens_are_known(model):
    """A greedy continuation is, token by token; with another token in it, it is not there."""
    prompt = random_tokens(UNTIED, 7).tolist()
    whole = prompt + greedy(model, prompt, 6)
    (_, likeliest), (_, changed) = score_tokens(model, [whole, [*whole[:9], (whole[9] + 1) % 32, *whole[10:]]])
    assert likeliest[6:].all()
    assert not changed[8]
    assert changed[6:8].all()


def test_logits_are_never_whole():
    """A chunk of [b, t, v] is nowhere in the program, one of `POSITIONS` is."""
    b, t = 2, 4 * POSITIONS
    model, cache = random_model(UNTIED), init_cache(UNTIED, b, t)
    tokens, real = jnp.zeros((b, t), jnp.int32), jnp.full(b, t)
    program = str(jax.make_jaxpr(_score_piece)(model, tokens, tokens, real, cache))
    assert f"f32[{b},{POSITIONS},{UNTIED.vocab_size}]" in program
    assert f"f32[{b},{t},{UNTIED.vocab_size}]" not in program


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ("text", {}, "texts='text': expected a list of them"),
        (["text"], {}, "texts are strings: expected a tokenizer"),
        (["A", ""], {"tokenizer": Letters()}, "text 1 is empty, expected text"),
        ([[1], []], {}, "text 1 is empty, expected at least one token"),
        ([[1, 32]], {}, "text 0 holds token 32, expected ids in [0, 32)"),
        ([[1]], {"batch": 0}, "batch=0, chunk=256: expected integers, at least 1"),
        ([[1]], {"chunk": 1.5}, "batch=8, chunk=1.5: expected integers, at least 1"),
    ],
)
def test_score_names_wrong_arguments(unchecked, model, rows, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        score(model, rows, **options)
