"""One full pass = a prefill of any length, then steps, or a second prefill: logits and all that is carried on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.checkpoint.variants import VARIANTS
from tests.helpers import SMALL, abstract_model, assert_close, forward, random_model, random_tokens
from zamba2_jax import cache_bytes, decode_step, init_cache, prefill, preset

T, CAPACITY = 8, 10


def row_of(cache, row):
    """The cache's content for one row, slots beyond its T tokens left out."""
    cache = jax.tree.map(lambda array: np.asarray(array)[row], cache)
    return cache.replace(calls=jax.tree.map(lambda array: array[:T], cache.calls))


def test_prefill_at_every_split_then_steps_or_more_prefill(x64):
    """Row i takes i + 1 tokens at first, padded; then the rest one by one, and, in another branch, at once."""
    model = random_model(SMALL, jnp.float64)
    row = random_tokens(SMALL, T)
    full = forward(model, row[None])[0]
    last, whole = prefill(model, row[None], capacity=CAPACITY)
    assert_close(last[0], full[-1], 1e-12)

    lengths = jnp.arange(1, T)
    first, cache = prefill(model, jnp.stack([row] * (T - 1)), lengths, capacity=CAPACITY)
    assert_close(first, full[:-1], 1e-12)

    rest = jnp.stack([jnp.roll(row, -int(length)) for length in lengths])
    rest = jnp.concatenate([rest, rest], axis=1)[:, :T]
    logits, joined = prefill(model, rest, T - lengths, cache)
    assert_close(logits, jnp.stack([full[-1]] * (T - 1)), 1e-12)
    for i in range(T - 1):
        assert_close(row_of(joined, i), row_of(whole, 0), 1e-12, f"split at {lengths[i]} ")

    stepped = cache
    for taken in range(1, T):
        logits, stepped = decode_step(model, rest[:, taken - 1], stepped)
        live = T - taken  # rows that had a token left to take
        assert_close(logits[:live], full[taken:], 1e-12)
        assert_close(row_of(stepped, live - 1), row_of(whole, 0), 1e-12, f"after {taken} steps ")
        if taken < T - 1:  # row 0 has come to where row `taken` was after its prefill
            assert_close(row_of(stepped, 0), row_of(cache, taken), 1e-12, f"prefill of {taken + 1} ")


def test_an_empty_cache_is_all_zeros_and_float32_where_sums_are_held():
    cache = init_cache(SMALL, 2, CAPACITY, jnp.bfloat16)
    assert (cache.capacity, cache.lengths.tolist()) == (CAPACITY, [0, 0])
    assert (len(cache.layers), len(cache.calls)) == (3, 2)
    state, kv = cache.layers[0], cache.calls[0]
    shapes = (state.conv_x.shape, state.conv_bc.shape, state.ssm.shape, kv.k.shape, kv.v.shape)
    assert shapes == ((2, 3, 48), (2, 3, 40), (2, 6, 8, 10), (2, 4, CAPACITY, 12), (2, 4, CAPACITY, 12))
    assert state.conv_x.dtype == state.conv_bc.dtype == jnp.bfloat16
    assert kv.k.dtype == kv.v.dtype == (jnp.uint16 if jax.default_backend() == "cpu" else jnp.bfloat16)
    assert state.ssm.dtype == jnp.float32
    model = abstract_model(SMALL, jnp.bfloat16)
    _, after = jax.eval_shape(prefill, model, random_tokens(SMALL, 2, 4))
    assert jax.tree.map(lambda array: array.dtype, after) == jax.tree.map(lambda array: array.dtype, cache)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_cache_bytes_are_those_of_the_arrays(config, dtype):
    def measured(capacity):
        return sum(array.nbytes for array in jax.tree.leaves(init_cache(config, 3, capacity, dtype)))

    size = cache_bytes(config, 3, 7, dtype)
    assert size.total == measured(7)
    assert size.constant == measured(0)
    assert size.per_token == measured(8) - measured(7)


def test_cache_bytes_of_a_released_model():
    """Zamba2-1.2B, one row: 6 of 38 layers hold keys and values, of 32 heads of 128."""
    size = cache_bytes(preset("zamba2-1.2b"), 1, 4096, jnp.bfloat16)
    assert size.per_token == 6 * 2 * 32 * 128 * 2
    assert size.total == size.constant + 4096 * size.per_token
