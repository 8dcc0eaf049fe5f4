import jax
import jax.numpy as jnp
import pytest

from zamba2_jax.parity import layerwise


@pytest.fixture(autouse=True)
def forget():
    yield
    layerwise.compiler_options.cache_clear()


def test_what_can_be_made_at_once_is_made_when_it_is_used():
    def run(x, matrices):
        for matrix in matrices:
            x = jnp.tanh(x @ matrix.astype(x.dtype))
        return x

    matrices = [jax.ShapeDtypeStruct((300, 300), jnp.bfloat16)] * 6
    lowered = jax.jit(run).lower(jax.ShapeDtypeStruct((7, 300), jnp.float32), matrices)
    default, ordered = (lowered.compile(compiler_options=o) for o in ({}, layerwise.compiler_options()))
    assert 2 * ordered.memory_analysis().temp_size_in_bytes < default.memory_analysis().temp_size_in_bytes


def test_a_compiler_that_does_not_know_the_order_is_not_asked_for_it(monkeypatch):
    monkeypatch.setattr(layerwise, "IN_LITTLE_MEMORY", {"xla_cpu_of_another_time": "1"})
    layerwise.compiler_options.cache_clear()
    assert layerwise.compiler_options() == {}
