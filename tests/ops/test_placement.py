import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers import normal
from zamba2_jax.ops.placement import compiled_apart


def test_what_is_compiled_apart_is_computed_by_no_reader():
    """Of a cosine that many elements read, the program for CPU has no copy in what reads it."""
    x, angles = normal(64, 32, dtype=jnp.float32), normal(32, dtype=jnp.float32)

    def read(x: jax.Array, angles: jax.Array) -> jax.Array:
        return x * compiled_apart(jnp.cos, angles)

    compiled = jax.jit(read).lower(x, angles).compile()
    reader = next(part for part in compiled.as_text().split("\n\n") if "ROOT" in part and "f32[64,32]" in part)
    assert "cosine" not in reader
    np.testing.assert_allclose(compiled(x, angles), x * np.cos(angles), rtol=1e-6)


def test_what_is_compiled_apart_is_not_kept_from_before():
    """A product that is computed again stays two of them; plain, XLA makes them one and keeps it."""
    x = normal(32, 32, dtype=jnp.float32)

    def count(again) -> int:
        program = jax.jit(lambda x: (x @ x, again(jnp.matmul, x, x))).lower(x).compile().as_text()
        return program.count(" dot(")

    assert count(lambda function, *arrays: function(*arrays)) == 1
    assert count(compiled_apart) == 3  # one, and a branch and its twin
