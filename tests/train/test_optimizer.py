import re
from functools import reduce
from operator import getitem

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zamba2_jax.checkpoint.store import restore_state, save_state
from zamba2_jax.nn.parameter import named_parameters
from zamba2_jax.train.optimizer import AdamW, Muon, ParameterGroup, decay_mask
from zamba2_jax.train.patterns import scale_matrices
from zamba2_jax.train.step import init_state


def test_mask_spares_norms_biases_and_the_vectors_of_the_scan(model):
    mask = {name: bool(leaf.get_value()) for name, leaf in named_parameters(decay_mask(model)).items()}
    spared = {name.split(".")[-1] for name, decays in mask.items() if not decays}
    assert spared == {
        *("norm", "mlp_norm", "A_log", "D", "dt_bias", "conv_x_bias", "conv_bc_bias", "in_z_bias", "in_x_bias"),
        *("in_bc_bias", "in_dt_bias", "out_bias", "gate_bias", "up_bias", "down_bias"),
    }
    decayed = {name.split(".")[-1] for name, decays in mask.items() if decays}
    assert not spared & decayed
    assert {"embed", "in_z", "out", "conv_x", "q_residual", "v_embedded", "down", "q_a", "linear"} <= decayed


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


SHAPES = {
    "embed": (7, 4),
    "layers": {"0": {"in_z": (6, 4), "conv_x": (4, 6), "norm": (6,)}, "1": {"in_z": (6, 4), "norm": (6,)}},
    "shared": {"0": {"q": (4, 4)}},
}


def random_tree(seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape)), SHAPES, is_leaf=lambda s: type(s) is tuple
    )


def test_muon_is_optax_s_on_matrices_and_adam_elsewhere(x64):
    numbers = optax.contrib.MuonDimensionNumbers(1, 0)
    params = random_tree(0)
    adam = {
        "embed": None,
        "layers": {"0": {"in_z": numbers, "conv_x": None, "norm": None}},
        "shared": {"0": {"q": numbers}},
    }
    adam["layers"]["1"] = {"in_z": numbers, "norm": None}
    theirs = optax.contrib.muon(
        1.0, nesterov=False, adam_b2=0.95, muon_weight_dimension_numbers=adam, consistent_rms=0.2
    )
    ours = Muon(clip_norm=1e9, weight_decay=0.0, nesterov=False).transformation()
    states = [ours.init(params), theirs.init(params)]
    for seed in range(3):
        # Large, so that 1e-8 is nothing: theirs adds it to the norm of a mean of gradients, ours to that of a sum.
        grads = jax.tree.map(lambda gradient: 1e6 * gradient, random_tree(1 + seed))
        results = [chain.update(grads, state, params) for chain, state in zip((ours, theirs), states, strict=True)]
        states = [state for _, state in results]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, -b, rtol=1e-9), results[0][0], results[1][0])


def test_the_update_of_muon_has_the_root_mean_square_of_adam_and_equal_singular_values(x64):
    grads = random_tree(0)
    optimizer = Muon(weight_decay=0.0).transformation()
    update, _ = optimizer.update(grads, optimizer.init(grads), grads)
    for name in "01":
        matrix, gradient = (np.asarray(tree["layers"][name]["in_z"]) for tree in (update, grads))
        u, _, v = np.linalg.svd(gradient, full_matrices=False)
        inside = u.T @ matrix @ v.T / (0.2 * np.sqrt(6))
        np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=1e-8)
        assert np.all((np.diag(inside) > 0.6) & (np.diag(inside) < 1.3))
        assert 0.1 < np.sqrt(np.mean(matrix**2)) < 0.25


def test_of_groups_the_last_one_counts(x64):
    groups = (
        ParameterGroup(match="*", rate=0.5, delay_steps=10, delay_power=2),
        ParameterGroup(match="layers.*", weight_decay=0.4),
        ParameterGroup(match="layers.[1-9].*", rate=3),
        ParameterGroup(match="embed", delay_steps=0),
    )
    plain, grouped = AdamW(weight_decay=0.0).transformation(), AdamW(weight_decay=0.1, groups=groups).transformation()
    params, grads = random_tree(0), random_tree(1)
    expected, _ = plain.update(grads, plain.init(params), params)
    for step, risen in ((0, 0), (4, 0.16), (10, 1), (99, 1)):
        update, _ = grouped.update(grads, grouped.init(params), params, step=jnp.int32(step))
        for path, decay, factor in (
            (("embed",), 0.1, 0.5),
            (("layers", "0", "in_z"), 0.4, 0.5 * risen),
            (("layers", "0", "norm"), 0, 0.5 * risen),  # a vector
            (("layers", "1", "in_z"), 0.4, 3 * risen),
            (("shared", "0", "q"), 0.1, 0.5 * risen),
        ):
            found, before, parameter = (reduce(getitem, path, tree) for tree in (update, expected, params))
            np.testing.assert_allclose(
                found, factor * (before + decay * parameter), rtol=1e-7, err_msg=f"{step} {path}"
            )


def test_fresh_matrices_are_scaled_by_the_last_pattern_and_vectors_are_not(model):
    scaled = named_parameters(scale_matrices(model, {"shared.*": 2.0, "embed": 4.0, "*.o": 0.5}))
    for name, parameter in named_parameters(model).items():
        factor = 4 if name == "embed" else 0.5 if name.endswith(".o") else 2 if name.startswith("shared.") else 1
        factor = factor if parameter.get_value().ndim > 1 else 1
        np.testing.assert_array_equal(scaled[name][...], factor * parameter[...], err_msg=name)
    with pytest.raises(ValueError, match=re.escape("init_scale.shard.*='shard.*' fits no parameter")):
        scale_matrices(model, {"shard.*": 2.0})


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("shard.*", "did you mean 'shared.*'"),
        ("embd", "did you mean 'embed'"),
        ("*.inz", "did you mean '*.in_z'"),
        ("layers.*.mamba.in_zz", "did you mean 'layers.*.mamba.in_z'"),
        ("???", "expected names like"),
    ],
)
def test_a_group_that_nothing_is_in_is_an_error_that_lists_near_names(model, pattern, near):
    optimizer = AdamW(groups=(ParameterGroup(match="*"), ParameterGroup(match=pattern))).transformation()
    with pytest.raises(ValueError, match=re.escape(f"optimizer.groups.1.match={pattern!r} fits no parameter: {near}")):
        jax.eval_shape(optimizer.init, model)


def test_of_muon_matrices_have_one_moment_and_a_checkpoint_all(model, tmp_path):
    state = init_state(model, Muon().transformation())
    matrices = [name for name, mask in named_parameters(decay_mask(model)).items() if mask.get_value()]
    twice = [name for name in matrices if name == "embed" or ".conv_" in name]
    sizes = {name: parameter.get_value().size for name, parameter in named_parameters(model).items()}
    moments = sum(sizes.values()) * 2 - sum(sizes[name] for name in matrices if name not in twice)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) == moments + 1  # Adam's count
    save_state(tmp_path / "s", state)
    restored = restore_state(tmp_path / "s", jax.eval_shape(lambda: state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize(
    ("field", "value"), [("b1", 1.0), ("b2", -0.1), ("eps", 0.0), ("weight_decay", -1.0), ("clip_norm", 0.0)]
)
def test_bad_values_name_field_and_value(field, value):
    for kind in (AdamW, Muon):
        with pytest.raises(ValueError, match=f"{field}={value}: expected"):
            kind(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("momentum", 1.0), ("newton_schulz_steps", 0), ("rms", 0.0)])
def test_bad_values_of_muon_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}: expected"):
        Muon(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("rate", -1.0), ("delay_steps", -1), ("delay_power", 0.0), ("match", "")])
def test_bad_values_of_groups_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}: expected"):
        ParameterGroup(**{"match": "*", field: value})
