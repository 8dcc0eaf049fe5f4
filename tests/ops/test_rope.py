import jax.numpy as jnp
import numpy as np

from tests.helpers import assert_close, normal
from zamba2_jax.ops import rotate

BASE = 50.0


def test_rotates_half_split_pairs(x64):
    """As complex numbers: pair i, (x_i, x_{i + p/2}), is multiplied by e^(i angle)."""
    x, positions = normal(2, 3, 4, 6), jnp.array([[0, 1, 2], [7, 0, 5]])
    pairs = np.asarray(x[..., :3] + 1j * x[..., 3:])
    angles = np.asarray(positions)[..., None, None] * BASE ** (-2 * np.arange(3) / 6)
    turned = pairs * np.exp(1j * angles)
    assert_close(rotate(x, positions, BASE), np.concatenate([turned.real, turned.imag], axis=-1), 1e-14)


def test_scores_depend_on_differences_of_positions(x64):
    q, k, positions = normal(2, 5, 3, 8), normal(2, 5, 3, 8, seed=1), jnp.array([[0, 1, 2, 3, 4], [4, 0, 9, 9, 1]])

    def scores(shift):
        return jnp.einsum("bqhp,bkhp->bhqk", *(rotate(x, positions + shift, BASE) for x in (q, k)))

    assert_close(scores(1000), scores(0), 1e-11)  # angles of 1000 have an absolute error of 1e-13
    moved = jnp.einsum("bqhp,bkhp->bhqk", rotate(q, positions + 1, BASE), rotate(k, positions, BASE))
    assert not np.allclose(moved, scores(0), rtol=0.1)


def test_bfloat16_is_rotated_in_float32():
    """Positions above 256 are not bfloat16 numbers."""
    x, positions = normal(1, 4, 1, 8, dtype=jnp.bfloat16), jnp.array([[1001, 1003, 2005, 4095]])
    exact = rotate(x.astype(jnp.float32), positions, 10000.0)
    got = rotate(x, positions, 10000.0)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))
