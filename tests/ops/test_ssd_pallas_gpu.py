"""The GPU kernels of the scan, interpreted, against the recurrence in float64; and their lowering for real shapes."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import as_dtype, assert_close, assert_finite, for_a_gpu, normal
from tests.ops.ssd_arguments import ssd_arguments
from zamba2_jax import preset
from zamba2_jax.ops.decay import log_decays
from zamba2_jax.ops.ssd_pallas_gpu import Tuning, ssd_pallas_gpu
from zamba2_jax.ops.ssd_reference import ssd_sequential

# All different, but for r = h / g; p and n are filled up to 16, 150 tokens up to 160.
b, t, h, p, n, g = 3, 150, 6, 8, 7, 2


def arguments(*, length=t, groups=g, skip=True, initial=True):
    """Arguments of `ssd_sequential` as a dict of float32: three documents per row, padding inside and at both ends."""
    segment_ids = np.minimum(1 + np.arange(length) // 40, 3) * np.ones((b, 1), int)
    segment_ids[0, 20:23] = segment_ids[1, :3] = segment_ids[2, -5:] = 0
    arrays = ssd_arguments(b, length, h, p, groups, n, skip=skip, initial=initial)
    return {name: None if a is None else a.astype(np.float32) for name, a in arrays.items()}, segment_ids


def steep(length=t):
    """Time steps from 1e-6 to 1e3: log decays clamped at -128 next to those of -0.01; a row of nothing but padding."""
    rng = np.random.default_rng(1)
    inputs, segment_ids = arguments(length=length)
    inputs["dt"] = np.float32(10 ** rng.uniform(-6, 0, (b, length, h)))
    inputs["dt"][:, ::9] = 1e3
    inputs["x"][:, ::9] *= 1e-4  # what steep steps add would else hide all the rest
    inputs["A"] = -np.float32(10 ** rng.uniform(-2, 1.5, h))
    segment_ids[0] = 0
    return inputs, segment_ids


def kernel(x, dt, A, B, C, D, initial_state, segment_ids, tuning):
    dt = jnp.where(segment_ids[..., None] != 0, dt, 0)
    decays = log_decays(dt, A, segment_ids)
    return ssd_pallas_gpu(x, dt, decays, B, C, D, initial_state, interpret=True, tuning=tuning)


@partial(jax.jit, static_argnames="tuning")
def run(inputs, segment_ids, tuning=None):
    """y, state, and the gradients of a random sum of both. No tuning: of the recurrence."""

    def total(arrays):
        scan = ssd_sequential if tuning is None else partial(kernel, tuning=tuning)
        y, state = scan(**inputs | arrays, segment_ids=segment_ids)
        y = jnp.where(segment_ids[..., None, None] != 0, y, 0)
        weights = [normal(*a.shape, dtype=jnp.float32) for a in (y, state)]
        return jnp.sum(y.astype(state.dtype) * weights[0]) + jnp.sum(state * weights[1]), (y, state)

    arrays = {name: array for name, array in inputs.items() if array is not None}
    (_, outputs), gradients = jax.value_and_grad(total, has_aux=True)(arrays)
    return outputs, gradients


def expected(inputs, segment_ids):
    return run(as_dtype(inputs, jnp.float64), segment_ids)


# For one multiprocessor a program takes all heads there are, and rows whole; for 96 of them a head each, in segments.
CASES = [
    (Tuning(chunk=16, multiprocessors=1), {}),
    (Tuning(chunk=16, multiprocessors=96), {}),
    (Tuning(chunk=64, multiprocessors=1), {"groups": 1, "skip": False, "initial": False}),
    (Tuning(chunk=32), {"groups": 6, "length": 31}),
    (Tuning(chunk=256), {"groups": 3, "length": 1}),
]


@pytest.mark.parametrize(("tuning", "options"), CASES)
def test_equals_the_recurrence(x64, tuning, options):
    inputs, segment_ids = arguments(**options)
    got = run(as_dtype(inputs, jnp.float32), segment_ids, tuning)
    assert_close(got, expected(inputs, segment_ids), 2e-6)  # 32 roundings of 6e-8; A sums over 450 tokens


@pytest.mark.parametrize("multiprocessors", [1, 96])
def test_steep_and_flat_decays_stay_apart(x64, multiprocessors):
    inputs, segment_ids = steep()
    got = run(as_dtype(inputs, jnp.float32), segment_ids, Tuning(chunk=16, multiprocessors=multiprocessors))
    assert_close(got, expected(inputs, segment_ids), 1e-6)


def test_bfloat16_operands(x64):
    """Of every product one operand is rounded to bfloat16, by up to 2^-9; decays and sums are not."""
    inputs, segment_ids = arguments()
    inputs |= as_dtype({name: inputs[name] for name in ("x", "B", "C")}, jnp.bfloat16)
    outputs, gradients = run(inputs, segment_ids, Tuning(chunk=16, multiprocessors=1))
    assert [a.dtype for a in outputs] == [jnp.bfloat16, jnp.float32]
    assert {name: a.dtype for name, a in gradients.items()} == {name: a.dtype for name, a in inputs.items()}
    assert_close((outputs, gradients), expected(inputs, segment_ids), 2**-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extremes_stay_finite(dtype):
    inputs, segment_ids = steep(length=20)
    inputs |= as_dtype({name: inputs[name] for name in ("x", "B", "C")}, dtype)
    inputs["A"] = np.float32([0, -1e-30, -1e-2, -1, -1e4, -1e38])
    outputs, gradients = run(inputs, segment_ids, Tuning(chunk=16, multiprocessors=1))
    assert_finite((outputs, gradients))
    np.testing.assert_array_equal(outputs[1][0], inputs["initial_state"][0])  # a row of padding


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["zamba2-1.2b", "zamba2-2.7b", "zamba2-7b"])
def test_lowers_for_gpus(name, dtype):
    """To Triton, at the shapes of the released models. A row of up to 80 heads is cut, and so walked twice."""
    config = preset(name)
    rows, length, heads, channels = 1, 4096, config.mamba_heads, config.mamba_head_dim
    x = jax.ShapeDtypeStruct((rows, length, heads, channels), dtype)
    dt = jax.ShapeDtypeStruct((rows, length, heads), jnp.float32)
    B = jax.ShapeDtypeStruct((rows, length, config.ngroups, config.d_state), dtype)
    D = jax.ShapeDtypeStruct((heads,), jnp.float32)
    state = jax.ShapeDtypeStruct((rows, heads, channels, config.d_state), jnp.float32)

    def back(*inputs):
        outputs, pull = jax.vjp(ssd_pallas_gpu, *inputs)
        return outputs, pull(outputs)

    cut = heads <= 80
    for function, kernels in ((ssd_pallas_gpu, 2 + cut), (back, 5 + 2 * cut)):
        with for_a_gpu():
            text = jax.jit(function).trace(x, dt, dt, B, B, D, state).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("__gpu$xla.gpu.triton") == kernels


WRONG = [
    ({"x": jnp.zeros((1, 2, 3, 4), jnp.float16)}, {}, "x has dtype float16: expected bfloat16 or float32"),
    ({"B": jnp.zeros((1, 2, 2, 5))}, {}, "3 heads do not divide into 2 groups"),
    ({}, {"tuning": Tuning(chunk=48)}, "chunk=48: expected a power of two from 16 to 256"),
    ({}, {"tuning": Tuning(chunk=512)}, "chunk=512: expected a power of two from 16 to 256"),
]


@pytest.mark.parametrize(("arrays", "options", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_arguments_are_named(unchecked, arrays, options, message):
    inputs = {
        "x": jnp.zeros((1, 2, 3, 4)),
        "dt": jnp.zeros((1, 2, 3)),
        "log_decay": jnp.zeros((1, 2, 3)),
        "B": jnp.zeros((1, 2, 1, 5)),
        "C": jnp.zeros((1, 2, 1, 5)),
        "D": None,
        "initial_state": None,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        ssd_pallas_gpu(**inputs | arrays, **options)
