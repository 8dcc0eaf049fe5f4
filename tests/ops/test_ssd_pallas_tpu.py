"""The TPU kernels of the scan, interpreted, against the recurrence in float64; and through the TPU compiler."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import as_dtype, assert_finite
from zamba2_jax import preset
from zamba2_jax.ops.decay import log_decays
from zamba2_jax.ops.ssd_pallas_tpu import Tiling, choose_tiling, ssd_pallas_tpu, tiled_ssd
from zamba2_jax.ops.ssd_reference import ssd_sequential


def arguments(b=3, t=37, h=6, p=8, g=2, n=7, *, skip=True, initial=True, seed=0):
    """All sizes differ. Time steps from 1e-6 to 1e3, restarts and padding among them."""
    rng = np.random.default_rng(seed)
    dt = 10 ** rng.uniform(-3, 0.5, (b, t, h))
    dt[:, ::11] = np.resize([1e-6, 1e3], (b, 1, h))
    log_decay = np.clip(-dt * rng.uniform(0.05, 3, h), -128, 0)
    log_decay[:, 5::16] = -128
    log_decay[:, 6::16] = -0.01
    dt[:, 20:23] = log_decay[:, 20:23] = 0
    x = rng.standard_normal((b, t, h, p)) / np.maximum(dt[..., None], 1)
    return {
        "x": x,
        "dt": dt,
        "log_decay": log_decay,
        "B": rng.standard_normal((b, t, g, n)),
        "C": rng.standard_normal((b, t, g, n)),
        "D": rng.standard_normal(h) if skip else None,
        "initial_state": rng.standard_normal((b, h, p, n)) if initial else None,
    }


def oracle(x, dt, log_decay, B, C, D, initial_state):
    """`ssd_sequential` with log decays of their own: steps of -log_decay at the rate -1, of inputs scaled to match."""
    step = 1e-30 - log_decay  # not 0, which it is divided by
    y, state = ssd_sequential(
        x * (dt / step)[..., None], step, -jnp.ones(x.shape[2]), B, C, None, initial_state=initial_state
    )
    return (y if D is None else y + D[:, None] * x), state


@partial(jax.jit, static_argnums=0)
def results(function, inputs, weights):
    """y, the last state, and the gradient of a random sum of both by every argument."""

    def total(inputs):
        y, state = function(**inputs)
        return jnp.vdot(y.astype(weights[0].dtype), weights[0]) + jnp.vdot(state, weights[1]), (y, state)

    gradients, (y, state) = jax.grad(total, has_aux=True)(inputs)
    return {"y": y, "state": state} | gradients


def random_weights(inputs):
    """Of y and of the state."""
    rng, (b, _, h, p) = np.random.default_rng(1), inputs["x"].shape
    shapes = inputs["x"].shape, (b, h, p, inputs["B"].shape[-1])
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def errors(function, inputs, dtype=jnp.float32):
    """Of every result: the norm of its difference to the oracle's on the same numbers, over the norm of that."""
    low = {name: None if a is None else jnp.asarray(a, jnp.float32) for name, a in inputs.items()}
    low |= {name: low[name].astype(dtype) for name in ("x", "B", "C")}
    weights = random_weights(inputs)
    got = results(function, low, weights)
    with jax.enable_x64(True):
        expected = jax.device_get(results(oracle, *as_dtype((low, weights), jnp.float64)))
    got = jax.device_get(got)
    return jax.tree.map(lambda a, e: np.linalg.norm(np.float64(a) - e) / np.linalg.norm(e), got, expected)


# Several chunks per step, steps, blocks per group, groups; 16 heads, 2 heads and 1 head per 128 channels.
CASES = [
    (Tiling(8, 2, 16), {}),
    (Tiling(8, 3, 2), {"b": 1, "t": 41, "h": 12, "p": 64, "g": 2, "n": 10, "initial": False, "skip": False}),
    (Tiling(16, 1, 1), {"b": 2, "t": 29, "h": 3, "p": 130, "g": 3, "n": 20, "initial": False}),
]


@pytest.mark.parametrize(("tiling", "sizes"), CASES)
def test_equals_the_recurrence(tiling, sizes):
    found = errors(partial(tiled_ssd, tiling=tiling, interpret=True), arguments(**sizes))
    assert max(jax.tree.leaves(found)) < 5e-7, found  # 8 roundings of 6e-8


# In bfloat16, matrix products round both their operands by up to 2^-9.
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 5e-7), (jnp.bfloat16, 2**-8)])
def test_equals_the_recurrence_as_it_is_tiled(dtype, tolerance):
    found = errors(partial(ssd_pallas_tpu, interpret=True), arguments(b=1, t=300, h=6, p=64, g=1, n=72), dtype)
    assert max(jax.tree.leaves(found)) < tolerance, found


def test_extremes_stay_finite():
    """dt and A over many decades, to where dt A overflows; documents; and a row of padding, which changes nothing."""
    inputs = arguments(skip=False)
    b, t, h = inputs["dt"].shape
    ids = np.stack([np.zeros(t, int), np.arange(t) // 9, np.ones(t, int)])
    dt = np.resize([0, 1e-38, 1e-6, 1e-3, 1, 1e2, 1e3], (b, t, h)) * (ids != 0)[..., None]
    A = np.array([0, -1e-6, -1e-2, -1, -1e4, -1e38])
    inputs |= {name: inputs[name] * 1e-3 for name in ("x", "B", "C", "initial_state")} | {"dt": dt}
    inputs = {name: None if a is None else jnp.asarray(a, jnp.float32) for name, a in inputs.items()}
    inputs["log_decay"] = log_decays(inputs["dt"], jnp.asarray(A, jnp.float32), jnp.asarray(ids))
    got = results(partial(tiled_ssd, tiling=CASES[0][0], interpret=True), inputs, random_weights(inputs))
    assert_finite(got)
    np.testing.assert_array_equal(got["state"][0], inputs["initial_state"][0])


def test_other_dtypes_are_refused():
    inputs = {name: jnp.asarray(a, jnp.float16) for name, a in arguments().items()}
    with pytest.raises(ValueError, match="x has dtype float16, expected bfloat16 or float32"):
        ssd_pallas_tpu(**inputs)


TILINGS = {"zamba2-1.2b": Tiling(128, 4, 16), "zamba2-2.7b": Tiling(128, 2, 16), "zamba2-7b": Tiling(128, 2, 14)}


@pytest.mark.parametrize(("name", "tiling"), TILINGS.items())
def test_released_models_need_no_padding(name, tiling):
    c = preset(name)
    h, p, g, n = c.mamba_heads, c.mamba_head_dim, c.ngroups, c.d_state
    assert choose_tiling((1, 4096, h, p), (1, 4096, g, n), jnp.bfloat16) == tiling
    assert (h // g) % tiling.heads == 0
    assert tiling.heads * p % 128 == 0


def test_compiles_for_a_tpu(tpu_sharding):
    """Forward and backward of zamba2-7b, by the real compiler, and no copy of anything as large as x around them."""
    b, t, h, p, g, n = 3, 2048, 112, 64, 2, 64

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=tpu_sharding)

    def scan(x, dt, log_decay, B, C, D, initial_state):
        y, state = ssd_pallas_tpu(
            x.reshape(b, t, h, p), dt, log_decay, *(a.reshape(b, t, g, n) for a in (B, C)), D, initial_state
        )
        return y.reshape(x.shape), state

    x, projection = array(b, t, h * p, dtype=jnp.bfloat16), array(b, t, g * n, dtype=jnp.bfloat16)
    per_head, state = array(b, t, h), array(b, h, p, n)
    arguments = (x, per_head, per_head, projection, projection, array(h), state)
    gradients = jax.jit(lambda arguments, cotangents: jax.vjp(scan, *arguments)[1](cotangents))
    text = gradients.lower(arguments, (x, state)).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    operations = set(re.findall(rf"= bf16\[{b},{t},{h * p}\]\S* ([a-z-]+)\(", text))
    assert operations <= {"parameter", "get-tuple-element", "bitcast"}
