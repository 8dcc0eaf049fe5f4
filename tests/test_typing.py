import jax.numpy as jnp
import numpy as np

from tests.helpers import SMALL, abstract_model, random_model
from zamba2_jax.nn.parameter import named_parameters
from zamba2_jax.typing import at_least_fp32, cast_matrices, param_dtype


def test_policy(x64):
    assert at_least_fp32(jnp.bfloat16) == at_least_fp32(jnp.float16, jnp.bfloat16) == jnp.float32
    assert at_least_fp32(jnp.float64) == at_least_fp32(jnp.bfloat16, jnp.float64) == jnp.float64
    assert [param_dtype(ndim, jnp.bfloat16) for ndim in (0, 1, 2)] == [jnp.float32, jnp.float32, jnp.bfloat16]
    assert param_dtype(1, jnp.float64) == jnp.float64


def test_cast_matrices_gives_the_dtypes_of_a_model_made_so():
    model = random_model(SMALL)
    cast = named_parameters(cast_matrices(model, jnp.bfloat16))
    assert {name: p.dtype for name, p in cast.items()} == {
        name: p.dtype for name, p in named_parameters(abstract_model(SMALL, jnp.bfloat16)).items()
    }
    np.testing.assert_array_equal(cast["embed"][...], model.embed[...].astype(jnp.bfloat16))
    assert cast_matrices(model, None) is model
