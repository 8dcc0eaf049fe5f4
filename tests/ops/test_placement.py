import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers import normal
from zamba2_jax.ops.placement import computed_once


def test_what_is_computed_once_is_computed_by_no_reader():
    """Of a cosine that many elements read, the program for CPU has no copy in what reads it."""
    x, angles = normal(64, 32, dtype=jnp.float32), normal(32, dtype=jnp.float32)

    def read(x: jax.Array, angles: jax.Array) -> jax.Array:
        return x * computed_once(jnp.cos, angles)

    compiled = jax.jit(read).lower(x, angles).compile()
    reader = next(part for part in compiled.as_text().split("\n\n") if "ROOT" in part and "f32[64,32]" in part)
    assert "cosine" not in reader
    np.testing.assert_allclose(compiled(x, angles), x * np.cos(angles), rtol=1e-6)
