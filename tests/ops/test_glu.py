import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.helpers import assert_close, normal
from zamba2_jax.ops import geglu, swiglu


def test_is_the_activation_times_the_other(x64):
    gate, up = 4 * normal(3, 5), normal(3, 5, seed=1)
    phi = np.vectorize(lambda x: math.erfc(-x / math.sqrt(2)) / 2)(np.asarray(gate))
    assert_close(geglu(gate, up), gate * phi * up, 1e-14)
    assert_close(swiglu(gate, up), gate / (1 + np.exp(-np.asarray(gate))) * up, 1e-14)


@pytest.mark.parametrize("op", [geglu, swiglu])
def test_gradients_are_those_of_finite_differences(x64, op):
    check_grads(jax.jit(op), (normal(3, 5), normal(3, 5, seed=1)), order=1, modes=["rev"])


@pytest.mark.parametrize("op", [geglu, swiglu])
def test_low_precision_is_rounded_once(op):
    gate, up = (4 * normal(64, 32, seed=seed, dtype=jnp.bfloat16) for seed in range(2))
    expected = op(gate.astype(jnp.float32), up.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(op(gate, up), expected)
