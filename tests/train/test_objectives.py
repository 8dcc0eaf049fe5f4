import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import SMALL, assert_close, assert_finite, forward, random_model, random_tokens
from zamba2_jax import next_token_loss

# Documents of 3, 4, 1 and 2 tokens, the third alone between padding; and a row of padding.
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0, 3, 0, 1, 1, 0], [0] * 13])


@jax.jit
def loss_and_gradient(model, tokens, segment_ids):
    return jax.value_and_grad(lambda model: next_token_loss(model, tokens, segment_ids, chunk_size=5), has_aux=True)(
        model
    )


def direct(logits, tokens, pairs):
    """Mean negative log likelihood over (row, time) of a token and the one after it."""
    log_p = np.asarray(jax.nn.log_softmax(logits))
    return -np.mean([log_p[row, i, tokens[row, i + 1]] for row, i in pairs])


def test_loss_of_whole_rows(x64):
    model, tokens = random_model(SMALL, jnp.float64), random_tokens(SMALL, 2, 8)
    loss, count = jax.jit(next_token_loss)(model, tokens)
    expected = direct(forward(model, tokens), tokens, [(row, i) for row in range(2) for i in range(7)])
    assert_close(loss, expected, 1e-12)
    assert count == 14


def test_loss_of_documents_and_its_gradient(x64):
    model, tokens = random_model(SMALL, jnp.float64), random_tokens(SMALL, 2, 13)
    (loss, count), gradient = loss_and_gradient(model, tokens, SEGMENTS)
    pairs = [(0, i) for i in (0, 1, 3, 4, 5, 10)]
    assert count == len(pairs)
    assert_close(loss, direct(forward(model, tokens, SEGMENTS), tokens, pairs), 1e-12)
    assert_finite(gradient)

    def moved(by, direction):
        at = jax.tree.map(lambda a, b: jnp.asarray(np.asarray(a) + by * np.asarray(b)), model, direction)
        return loss_and_gradient(at, tokens, SEGMENTS)[0][0]

    step = 1e-6
    for seed in range(3):
        direction = random_model(SMALL, jnp.float64, seed=10 + seed)
        slope = sum(np.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
        # Central differences err by step^2 of the third derivative, and by 1e-16 / step in rounding.
        assert_close((moved(step, direction) - moved(-step, direction)) / (2 * step), slope, 1e-7)

    (loss, count), gradient = loss_and_gradient(model, tokens, jnp.zeros_like(SEGMENTS))
    assert (loss, count) == (0, 0)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_weights_are_of_the_tokens_predicted(x64):
    """A weighted mean; the weight of a token that nothing predicts, be it NaN, does not count."""
    model, tokens = random_model(SMALL, jnp.float64), random_tokens(SMALL, 2, 13)
    weights = np.random.default_rng(0).uniform(size=tokens.shape) * (np.arange(13) % 3 != 1)
    pairs = [(0, i) for i in (0, 1, 3, 4, 5, 10)]
    log_p = np.asarray(jax.nn.log_softmax(forward(model, tokens, SEGMENTS)))
    terms = [(weights[row, i + 1], -log_p[row, i, tokens[row, i + 1]]) for row, i in pairs]
    total = sum(weight for weight, _ in terms)
    first_of_document = weights.copy()
    first_of_document[0, [0, 3, 8]] = np.nan
    for given in (weights, first_of_document):
        loss, count = jax.jit(next_token_loss)(model, tokens, SEGMENTS, given)
        assert_close(count, total, 1e-14)
        assert_close(loss, sum(weight * nll for weight, nll in terms) / total, 1e-12)


@pytest.mark.parametrize("id_", [-100, SMALL.vocab_size])
def test_ids_outside_the_vocabulary_are_named(id_):
    tokens = np.ones((2, 5), np.int32)
    tokens[1, 3] = id_
    with pytest.raises(ValueError, match=f"row 1, position 3: token id {id_} is outside the vocabulary of 32 tokens"):
        next_token_loss(random_model(SMALL), jnp.asarray(tokens))
