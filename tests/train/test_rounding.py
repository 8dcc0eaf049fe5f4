from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from zamba2_jax.train.rounding import round_stochastically, stored
from zamba2_jax.train.stacks import Leaf


def test_rounding_is_unbiased():
    """Over all random bits, each once, the mean is what was rounded, and both neighbours are the nearest there are."""
    bits = jnp.arange(2**16, dtype=jnp.uint16)
    for x in (1.001, -1.001, 3.14159e-5, 1e-40, -7.77e20, 1 - 2**-20):
        x = np.float32(x)
        rounded = np.asarray(jax.jit(round_stochastically)(jnp.full(2**16, x), bits), np.float64)
        np.testing.assert_allclose(rounded.mean(), x, rtol=1e-12)
        low, high = sorted(set(rounded.tolist()))
        assert low < x < high
        nearest = float(jnp.asarray(x).astype(jnp.bfloat16))
        assert nearest in (low, high)


def test_what_bfloat16_holds_stays_as_it_is():
    held = jnp.array([0.0, -0.0, 1.5, -256.0, jnp.inf, -jnp.inf, jnp.nan, 2**-130], jnp.float32)
    for bits in (0, 1, 2**16 - 1):
        rounded = round_stochastically(held, jnp.full(held.shape, bits, jnp.uint16))
        np.testing.assert_array_equal(rounded.astype(jnp.float32), held)
        assert rounded.dtype == jnp.bfloat16


def test_small_updates_add_up():
    """200 updates of a fortieth of the distance of neighbours, none of which rounding to the nearest would keep."""
    ones, leaf = jnp.ones((40, 250), jnp.bfloat16), Leaf(("w",), stacked=False)

    def step(p, i):
        return stored(p.astype(jnp.float32) - 1e-4, p, leaf, i), None

    after = np.asarray(jax.jit(lambda p: jax.lax.scan(step, p, jnp.arange(200))[0])(ones), np.float64)
    # The standard error of the mean over 10,000 numbers is about 1e-4.
    assert abs(after.mean() - 0.98) < 4e-4
    assert float(ones[0, 0] - jnp.bfloat16(1e-4)) == 1


def test_bits_are_of_a_step_and_a_parameter_stacked_or_not():
    x = jnp.full((2, 3, 50), 1.001)
    like = x.astype(jnp.bfloat16)
    stack = jax.jit(partial(stored, leaf=Leaf(("a", "b"), stacked=True)))
    one = jax.jit(stored, static_argnames="leaf")
    together = stack(x, like, step=7)
    for i, name in enumerate("ab"):
        np.testing.assert_array_equal(one(x[i], like[i], leaf=Leaf((name,), stacked=False), step=7), together[i])
    assert len({array.tobytes() for array in (*np.asarray(together), *np.asarray(stack(x, like, step=8)))}) == 4
    same = stored(x, x, Leaf(("a",), stacked=False), jnp.int32(7))
    np.testing.assert_array_equal(same, x)
