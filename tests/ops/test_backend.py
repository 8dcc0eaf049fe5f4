"""One value says how ops are computed; the reference of it is differentiable as often as wanted, in any mode."""

import builtins
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import SMALL, assert_close, for_a_gpu, random_model, random_tokens
from zamba2_jax import Backend, default_backend, next_token_loss
from zamba2_jax.ops import backend as module
from zamba2_jax.ops import causal_attention
from zamba2_jax.parallel.mesh import MESH_AXES

REFERENCE = Backend.reference()
IDS = jnp.array([[1, 1, 1, 2, 2, 2, 0], [0, 3, 3, 3, 3, 4, 4]])


TWO = dataclasses.replace(SMALL, num_layers=2, hybrid_layer_ids=(1,))


def loss(model, backend):
    return next_token_loss(model, random_tokens(SMALL, 2, 7), IDS, backend=backend)[0]


def test_the_reference_is_the_default_and_its_gradient(x64):
    model = random_model(SMALL, jnp.float64)
    found, expected = (
        jax.jit(jax.value_and_grad(lambda model, backend=backend: loss(model, backend)))(model)
        for backend in (REFERENCE, default_backend(jnp.float64))
    )
    assert_close(found, expected, 1e-11)


def test_forward_mode_and_hessian_products_on_a_whole_model(x64):
    """Both against reverse mode: a directional derivative is <gradient, v>, and H is symmetric: <H v, w> = <H w, v>."""
    model, v, w = (random_model(TWO, jnp.float64, seed=seed) for seed in (0, 1, 2))

    def dot(a, b):
        return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

    @jax.jit
    def both(model, v, w):
        gradient = jax.grad(lambda model: loss(model, REFERENCE))
        slope = jax.jvp(lambda model: loss(model, REFERENCE), (model,), (v,))[1]
        logits = jax.jvp(lambda model: model(random_tokens(SMALL, 2, 7), IDS, backend=REFERENCE).sum(), (model,), (v,))
        products = [jax.jvp(gradient, (model,), (along,))[1] for along in (v, w)]
        of_logits = jax.grad(lambda model: model(random_tokens(SMALL, 2, 7), IDS, backend=REFERENCE).sum())(model)
        pairs = (slope, dot(gradient(model), v)), (logits[1], dot(of_logits, v))
        return *pairs, (dot(products[0], w), dot(products[1], v))

    for left, right in both(model, v, w):
        assert left == pytest.approx(float(right), rel=1e-9)
        assert abs(left) > 1e-3


def test_an_implementation_that_is_not_there_is_named(unchecked):
    with pytest.raises(ValueError, match="step='cuda': expected one of xla, pallas_gpu"):
        Backend(step="cuda")
    with pytest.raises(ValueError, match="scan='pallas': expected one of xla, "):
        Backend(scan="pallas")


def on_mesh(platform, kind):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    mesh = jax.sharding.AbstractMesh((2, 1, 1, 1), MESH_AXES, axis_types=auto, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def test_the_default_is_what_each_device_of_a_mesh_can_run(monkeypatch):
    with on_mesh("tpu", "TPU v5 lite"):
        assert default_backend(jnp.float32) == Backend(scan="pallas_tpu", attention="splash")
    with on_mesh("gpu", "NVIDIA H200"):  # each op runs apart on each device, but a step through a block does not
        expected = Backend(scan="pallas_gpu", attention="cudnn", cached_attention="cudnn")
        assert default_backend(jnp.bfloat16) == expected
    with on_mesh("cpu", "cpu"):
        assert default_backend(jnp.bfloat16) == Backend()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with for_a_gpu():
        assert default_backend(jnp.bfloat16).step == "pallas_gpu"
        assert default_backend("bfloat16") == default_backend(jnp.bfloat16)
        assert default_backend(jnp.float32).scan == "xla"
    with for_a_gpu("NVIDIA A100-SXM4-80GB"):
        assert default_backend(jnp.bfloat16) == Backend()


def test_a_kernel_package_that_is_missing_is_said_once(monkeypatch):
    real = builtins.__import__

    def without_triton(name, *arguments):
        if name == "jax.experimental.pallas" and "triton" in (arguments[2] or ()):
            raise ImportError("no triton here")
        return real(name, *arguments)

    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(builtins, "__import__", without_triton)
    module.has_triton.cache_clear()
    with for_a_gpu():
        with pytest.warns(UserWarning, match=re.escape("no Pallas through Triton (no triton here)")) as said:
            backends = [default_backend(jnp.bfloat16) for _ in range(2)]
        assert len(said) == 1
    assert {(backend.scan, backend.step, backend.attention) for backend in backends} == {("xla", "xla", "cudnn")}
    module.has_triton.cache_clear()


@pytest.mark.parametrize("h", [4, 2])
def test_plain_attention_is_attention(x64, h):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 7, heads, 6))) for heads in (4, h, h))
    expected = causal_attention(q, k, v, 0.3, IDS, "xla")
    found = causal_attention(q, k, v, 0.3, IDS, "plain")
    assert_close(
        jnp.where((IDS != 0)[..., None, None], found, 0), jnp.where((IDS != 0)[..., None, None], expected, 0), 1e-13
    )
