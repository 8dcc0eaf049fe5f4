"""The cache of compiled programs that outlives a run of the tests."""

import os

import jax
import jax.numpy as jnp
import pytest

from tests.compiled import shrink
from tests.helpers import compiled_anew


def test_the_programs_used_longest_ago_go_first(tmp_path):
    shrink(tmp_path / "none", 0)
    for hour, name in enumerate("abcd"):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (3600 * hour, 0))
    os.utime(tmp_path / "a", (5 * 3600, 0))
    shrink(tmp_path, 40)
    assert len(list(tmp_path.iterdir())) == 4
    shrink(tmp_path, 25)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "d"}


@pytest.fixture
def loaded():
    """A 1 for every program that was loaded from the cache, in which all are kept meanwhile."""
    found, option = [], "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, option)
    jax.config.update(option, 0)

    def listen(event, **_):
        found.extend([1] * event.endswith("/cache_hits"))

    jax.monitoring.register_event_listener(listen)
    yield found
    jax.monitoring.unregister_event_listener(listen)
    jax.config.update(option, before)


def test_programs_are_loaded_from_the_cache_but_for_tests_of_the_compiler(loaded, tmp_path):
    def compiled(scale):
        """A function that JAX has not seen, and a program that it has."""
        return jax.jit(lambda x: jnp.cumsum(x) * scale)(jnp.ones(7))

    compiled(3)
    loaded.clear()
    assert compiled(3)[-1] == 21
    assert loaded
    with compiled_anew(tmp_path):
        loaded.clear()
        assert compiled(3)[-1] == 21
        assert not loaded
    assert compiled(3)[-1] == 21
    assert loaded
