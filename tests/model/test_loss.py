import jax
import jax.numpy as jnp
import numpy as np

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
