import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.helpers import assert_close, normal
from zamba2_jax.ops import gated_rms_norm, norm, rms_norm


def test_rms_norm(x64):
    x, scale = normal(2, 3, 5), normal(5)
    expected = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 0.1) * scale
    assert_close(rms_norm(x, scale, 0.1), expected, 1e-14)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_gated_rms_norm_gates_first_and_norms_each_group(x64, monkeypatch, platform):
    monkeypatch.setattr(norm, "platform", lambda: platform)
    x, z, scale = normal(2, 3, 12), normal(2, 3, 12, seed=1), normal(12)
    gated = np.asarray(x * z / (1 + np.exp(-z)))
    expected = np.empty_like(gated)
    for group in range(3):
        part = gated[..., 4 * group : 4 * group + 4]
        expected[..., 4 * group : 4 * group + 4] = part / np.sqrt(np.mean(part**2, axis=-1, keepdims=True) + 0.1)
    assert_close(gated_rms_norm(x, z, scale, 3, 0.1), expected * scale, 1e-14)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_gradients_are_those_of_finite_differences(x64, monkeypatch, platform):
    monkeypatch.setattr(norm, "platform", lambda: platform)
    plain = jax.jit(lambda x, scale: rms_norm(x, scale, 0.1))
    gated = jax.jit(lambda x, z, scale: gated_rms_norm(x, z, scale, 3, 0.1))
    x, z, scale = normal(2, 3, 12), normal(2, 3, 12, seed=1), normal(12)
    check_grads(plain, (x, scale), order=1, modes=["rev"])
    check_grads(gated, (x, z, scale), order=1, modes=["rev"])


def test_low_precision_is_normed_in_float32():
    """Squares that overflow float16, a mean that bfloat16 cannot hold; scales that only float32 can."""
    x = jnp.full((1, 64), 300, jnp.float16)
    scale = jnp.full(64, 1 + 2**-10)
    assert (rms_norm(x, scale, 1e-5) == jnp.float16(1 + 2**-10)).all()
    assert (gated_rms_norm(x, x, scale, 2, 1e-5) == jnp.float16(1 + 2**-10)).all()


def test_zeros_are_finite():
    zeros = jnp.zeros((1, 4), jnp.bfloat16)
    assert (rms_norm(zeros, jnp.ones(4), 1e-5) == 0).all()
    assert (gated_rms_norm(zeros, zeros, jnp.ones(4), 2, 1e-5) == 0).all()
