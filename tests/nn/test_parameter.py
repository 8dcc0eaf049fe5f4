"""Fresh parameters: their statistics, and that no two draws are one."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tests.helpers import SMALL
from zamba2_jax import Zamba2, preset
from zamba2_jax.nn.parameter import named_parameters

CONFIG = dataclasses.replace(SMALL, mamba_heads=48, num_layers=4, add_bias_linear=True, initializer_range=0.05)


def fresh(seed):
    return Zamba2(CONFIG, rngs=nnx.Rngs(seed))


def test_statistics_of_fresh_parameters():
    model = fresh(0)
    matrices = {jax.tree_util.keystr(path): np.asarray(a) for path, a in jax.tree.leaves_with_path(model) if a.ndim > 1}
    for path, matrix in matrices.items():
        # The standard deviation of n samples is known to 1 / sqrt(2 n); five of these.
        assert abs(matrix.std() / 0.05 - 1) < 5 / np.sqrt(2 * matrix.size), path
        assert abs(matrix.mean()) < 5 * 0.05 / np.sqrt(matrix.size), path
    for (path, matrix), (other_path, other) in itertools.combinations(matrices.items(), 2):
        assert matrix.ravel()[0] != other.ravel()[0], (path, other_path)

    for layer in model.layers:
        np.testing.assert_allclose(layer.mamba.A_log[...], np.log(np.arange(1, 49)), rtol=1e-6)
        assert (layer.mamba.D[...] == 1).all()
        assert (layer.norm[...] == 1).all()
        assert (layer.mamba.norm[...] == 1).all()
        assert not any(
            bias[...].any() for bias in (layer.mamba.conv_x_bias, layer.mamba.in_dt_bias, layer.mamba.out_bias)
        )
    dt = np.stack([jax.nn.softplus(layer.mamba.dt_bias[...]) for layer in model.layers])
    assert dt.min() > 0.001 * 0.999
    assert dt.max() < 0.1 * 1.001
    # log dt is uniform over a width of log(100): mean and deviation of 192 samples, to five standard errors.
    log_dt = np.log(dt)
    width = np.log(100)
    assert abs(log_dt.mean() - np.log(0.01)) < 5 * width / np.sqrt(12 * dt.size)
    assert abs(log_dt.std() - width / np.sqrt(12)) < 5 * width / np.sqrt(60 * dt.size)

    again, other = fresh(0), fresh(1)
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (model, again)), strict=True))
    assert not (model.embed[...] == other.embed[...]).any()


def test_a_model_is_shown_on_a_page():
    model = fresh(0)
    text = repr(model)
    assert str(model) == text
    assert f"embed: float32[{CONFIG.vocab_size}, {CONFIG.hidden_size}]" in text
    assert f"layers.[0-3].mamba.A_log: 4 x float32[{CONFIG.mamba_heads}]" in text
    assert f"shared.0.norm: float32[{CONFIG.attention_size}]" in text
    large = repr(jax.eval_shape(lambda: Zamba2(preset("zamba2-7b"), rngs=nnx.Rngs(0))))
    assert "layers.[0-80].mamba.D: 81 x float32[112]" in large
    assert large.count("\n") < 60
    assert "calls.[0-1].linear: 2 x 'slow'" in repr(jax.tree.map(lambda leaf: "slow", model))


def test_optax_takes_labels_and_masks_as_the_documentation_says():
    model = jax.tree.map(jnp.ones_like, fresh(0))

    def labels(model):
        return jax.tree.map(lambda leaf: "vector" if leaf.ndim == 1 else "matrix", model)

    def mask(model):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, model)

    optimizer = optax.chain(
        optax.multi_transform({"matrix": optax.scale(2.0), "vector": optax.scale(3.0)}, labels),
        optax.masked(optax.scale(5.0), mask),
    )
    update, _ = jax.jit(lambda model: optimizer.update(model, optimizer.init(model), model))(model)
    expected = {"embed": 10.0, "norm": 3.0, "layers.0.mamba.in_z": 10.0}
    for name, factor in expected.items():
        np.testing.assert_array_equal(named_parameters(update)[name][...], factor)


def test_dt_starts_at_the_floor_or_above():
    config = dataclasses.replace(CONFIG, num_layers=1, hybrid_layer_ids=(0,), num_shared_blocks=1, time_step_floor=0.02)
    dt = jax.nn.softplus(Zamba2(config, rngs=nnx.Rngs(0)).layers[0].mamba.dt_bias[...])
    np.testing.assert_allclose(jnp.min(dt), 0.02, rtol=1e-5)
    assert (dt > 0.03).any()
