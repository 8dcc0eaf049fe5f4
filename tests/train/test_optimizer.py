import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zamba2_jax.model.parameter import named_parameters
from zamba2_jax.train.optimizer import AdamW, decay_mask


def test_mask_spares_norms_biases_and_the_vectors_of_the_scan(model):
    mask = {name: bool(leaf.get_value()) for name, leaf in named_parameters(decay_mask(model)).items()}
    spared = {name.split(".")[-1] for name, decays in mask.items() if not decays}
    assert spared == {
        *("norm", "mlp_norm", "A_log", "D", "dt_bias", "conv_x_bias", "conv_bc_bias", "in_z_bias", "in_x_bias"),
        *("in_bc_bias", "in_dt_bias", "out_bias", "gate_bias", "up_bias", "down_bias"),
    }
    decayed = {name.split(".")[-1] for name, decays in mask.items() if decays}
    assert not spared & decayed
    assert {"embed", "in_z", "out", "conv_x", "q_residual", "v_embedded", "down", "mlp_a", "linear"} <= decayed


def test_decay_reaches_the_matrices_and_nothing_else(model):
    optimizer = AdamW(weight_decay=0.25).transformation()
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), model)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model)
    update = jax.jit(lambda: optimizer.update(zeros, optimizer.init(ones), ones)[0])()
    for name, parameter in named_parameters(update).items():
        expected = 0.25 if len(parameter.shape) > 1 else 0.0
        np.testing.assert_array_equal(parameter[...], expected, err_msg=name)


def test_is_adamw_with_clipping():
    settings = AdamW(b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.1, clip_norm=0.5)
    ours = optax.chain(settings.transformation(), optax.scale(-0.01))
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(0.01, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.1, mask=decay_mask)
    )
    random = np.random.default_rng(0)
    params = {"w": jnp.asarray(random.normal(size=(3, 4))), "b": jnp.asarray(random.normal(size=4))}
    states = [ours.init(params), theirs.init(params)]
    for _ in range(4):
        grads = jax.tree.map(lambda p: jnp.asarray(random.normal(size=p.shape)), params)
        results = [chain.update(grads, state, params) for chain, state in zip((ours, theirs), states, strict=True)]
        states = [state for _, state in results]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), results[0][0], results[1][0])
        params = optax.apply_updates(params, results[0][0])


@pytest.mark.parametrize(
    ("field", "value"), [("b1", 1.0), ("b2", -0.1), ("eps", 0.0), ("weight_decay", -1.0), ("clip_norm", 0.0)]
)
def test_bad_values_name_field_and_value(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}: expected"):
        AdamW(**{field: value})
