"""The GPU kernels of a step, interpreted, against the block in float64; where they are used; their lowering."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import SMALL, abstract_model, as_dtype, assert_close, for_a_gpu, normal, random_model
from zamba2_jax import preset
from zamba2_jax.inference.decode import decode_step
from zamba2_jax.models.cache import init_cache
from zamba2_jax.nn.context import Context
from zamba2_jax.ops import mamba_step_pallas_gpu as of_gpu
from zamba2_jax.ops.backend import XLA, Backend
from zamba2_jax.ops.mamba_step_pallas_gpu import mamba_step_pallas_gpu, step_fits

# Heads of 32 and 64 channels, of which a program takes 16; 8 heads fill half a program.
GROUPED = dataclasses.replace(SMALL, hidden_size=128, mamba_heads=8, d_state=16, ngroups=2)
WIDE = dataclasses.replace(SMALL, hidden_size=256, mamba_heads=8, d_state=32, ngroups=1, time_step_limit=(0.02, 0.2))


def step(block, u, state, backend=XLA):
    return block.step(u, state, Context(jnp.zeros((len(u), 1), jnp.int32), backend=backend, is_step=True))


@pytest.mark.parametrize(("config", "rows"), [(GROUPED, 3), (WIDE, 16)])
def test_is_no_less_exact_than_the_plain_step(x64, monkeypatch, config, rows):
    block = random_model(config, jnp.bfloat16).layers[1].mamba
    empty = init_cache(config, rows, 4, jnp.bfloat16).layers[1]
    squares = np.zeros((2, len(jax.tree.leaves(empty)) + 1))
    for seed in range(4):  # of one alone, the errors of so few values differ by more than 1.05 by chance
        u = normal(rows, config.hidden_size, dtype=jnp.bfloat16, seed=seed)
        state = jax.tree.map(lambda array, seed=seed: normal(*array.shape, dtype=array.dtype, seed=10 + seed), empty)
        plain = step(block, u, state)
        exact = step(*(as_dtype(tree, jnp.float64) for tree in (block, u, state)))
        with monkeypatch.context() as on_gpu:
            on_gpu.setattr(of_gpu, "mamba_step_pallas_gpu", partial(mamba_step_pallas_gpu, interpret=True))
            got = step(block, u, state, Backend(step="pallas_gpu"))
        assert [a.dtype for a in jax.tree.leaves(got)] == [a.dtype for a in jax.tree.leaves(plain)]
        assert_close(got, exact, 2**-6)
        for total, found in zip(squares, (got, plain), strict=True):
            errors = jax.tree.map(lambda a, b: np.sum((np.asarray(a, np.float64) - np.asarray(b)) ** 2), found, exact)
            total += jax.tree.leaves(errors)
    ours, xla = np.sqrt(squares)
    assert (ours <= 1.05 * xla).all()  # a few values that round the other way


@pytest.mark.parametrize(
    ("rows", "dtype", "kernels"), [(16, jnp.bfloat16, 2), (17, jnp.bfloat16, 0), (3, jnp.float32, 0)]
)
@pytest.mark.parametrize("name", ["zamba2-1.2b", "zamba2-2.7b", "zamba2-7b"])
def test_a_few_rows_of_released_models_step_by_kernels(monkeypatch, name, rows, dtype, kernels):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    config = dataclasses.replace(preset(name), num_layers=2, hybrid_layer_ids=(0,), num_shared_blocks=1)
    model, token = abstract_model(config, dtype), jax.ShapeDtypeStruct((rows,), jnp.int32)
    cache = jax.eval_shape(lambda: init_cache(config, rows, 64, dtype))
    with for_a_gpu():
        text = decode_step.trace(model, token, cache).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == kernels * config.num_layers


WRONG = {
    "rows": {"u": jnp.zeros((17, 128), jnp.bfloat16)},
    "width": {"u": jnp.zeros((2, 120), jnp.bfloat16)},
    "dtype": {"u": jnp.zeros((2, 128))},
    "head": {"ssm": jnp.zeros((2, 8, 24, 16))},
}


@pytest.mark.parametrize("arrays", WRONG.values(), ids=WRONG)
def test_what_the_kernels_do_not_take_is_named(unchecked, arrays):
    given = {"u": jnp.zeros((2, 128), jnp.bfloat16), "ssm": jnp.zeros((2, 8, 32, 16))}
    assert step_fits(**given)
    u, ssm = (given | arrays).values()
    assert not step_fits(u, ssm)
    with pytest.raises(ValueError, match=re.escape(f"u is {u.dtype} {u.shape} and the state {ssm.shape}")):
        mamba_step_pallas_gpu(u, None, None, None, ssm, (0.0, 1.0))
