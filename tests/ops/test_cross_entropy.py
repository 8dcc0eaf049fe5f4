from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import assert_close, assert_finite, normal
from zamba2_jax.ops import cross_entropy, predictions

b, t, d, v = 2, 7, 5, 11


def plain(h, w, targets, weights, z_loss=0.0):
    logits = h @ w.T
    normalizer = jnp.log(jnp.exp(logits).sum(axis=-1))
    nll = normalizer - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (nll + z_loss * normalizer**2)), jnp.sum(weights * nll)


def arguments():
    rng = np.random.default_rng(0)
    weights = rng.uniform(size=(b, t))
    weights[0, 3], weights[1] = 0, 0
    return normal(b, t, d), normal(v, d), jnp.asarray(rng.integers(0, v, (b, t))), jnp.asarray(weights)


@partial(jax.jit, static_argnames=("loss", "z_loss", "chunk_size"))
def value_and_gradients(h, w, targets, weights, *, loss=cross_entropy, **options):
    def function(h, w, weights):
        objective, nll = loss(h, w, targets, weights, **options)
        return 0.7 * objective, nll

    return jax.value_and_grad(function, (0, 1, 2), has_aux=True)(h, w, weights)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 256])
def test_value_and_gradients(x64, chunk_size, z_loss):
    expected = value_and_gradients(*arguments(), loss=plain, z_loss=z_loss)
    assert_close(value_and_gradients(*arguments(), chunk_size=chunk_size, z_loss=z_loss), expected, 1e-13)
    options = {"chunk_size": chunk_size, "z_loss": z_loss}
    assert_close(cross_entropy(*arguments(), **options), plain(*arguments(), z_loss), 1e-13)


@pytest.mark.parametrize("chunk_size", [3, 256])
def test_predictions(x64, chunk_size):
    h, w, targets, weights = arguments()
    likeliest = jnp.argmax(h @ w.T, axis=-1)
    targets = targets.at[0, 2:5].set(likeliest[0, 2:5]).at[1].set(likeliest[1])  # of weights above 0, but for [0, 3]
    nll, hits = jax.jit(predictions, static_argnames="chunk_size")(h, w, targets, weights, chunk_size=chunk_size)
    assert_close(nll, plain(h, w, targets, weights)[1], 1e-13)
    assert hits == np.sum((likeliest == targets) & (weights > 0)) >= 2
    flat = predictions(h, jnp.zeros_like(w), targets.at[0, 0].set(0), weights)[1]
    assert flat == np.sum((targets.at[0, 0].set(0) == 0) & (weights > 0))  # all are equal: the first counts


def test_no_gradient_flows_through_the_second_sum():
    h, w, targets, weights = arguments()
    assert not np.any(jax.grad(lambda h: cross_entropy(h, w, targets, weights)[1])(h))


def test_large_logits_and_no_weights_are_finite():
    h, w, targets, weights = arguments()
    assert_finite(value_and_gradients(h * 1e5, w, targets, weights, chunk_size=2))
    values, gradients = value_and_gradients(h, w, targets, jnp.zeros_like(weights), chunk_size=2)
    assert values == (0, 0)
    assert not any(np.any(gradient) for gradient in gradients[:2])


def test_bfloat16_is_summed_in_float32():
    h, w, targets, weights = arguments()
    low = h.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    got, _ = cross_entropy(*low, targets, weights)
    assert got.dtype == jnp.float32
    # The products of bfloat16 numbers are exact in float32; only sums round.
    assert_close(got, plain(*(x.astype(jnp.float32) for x in low), targets, weights)[0], 1e-6)


def test_logits_are_never_all_in_memory():
    rows, length, width, vocab = 1, 2048, 16, 4096
    h, w = jnp.zeros((rows, length, width)), jnp.zeros((vocab, width))
    targets, weights = jnp.zeros((rows, length), int), jnp.zeros((rows, length))

    def temporaries(loss, **options):
        step = jax.jit(jax.value_and_grad(lambda h, w: loss(h, w, targets, weights, **options)[0], (0, 1)))
        return step.lower(h, w).compile().memory_analysis().temp_size_in_bytes

    logits = rows * length * vocab * 4
    assert temporaries(plain) >= logits  # so the figure sees them
    assert temporaries(cross_entropy, chunk_size=64) < logits / 8
