"""A matrix may be another kind of value than an array, wherever it stands in a model."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.helpers import SMALL, assert_close, forward, normal, random_model, random_tokens
from zamba2_jax import decode_step, named_parameters, next_token_loss, prefill, save_hf
from zamba2_jax.nn.linear import LowRankSum

PLACES = {
    "layers.1.mamba.in_z": ("in_z", lambda model: model.layers[1].mamba),
    "layers.2.mamba.out": ("out", lambda model: model.layers[2].mamba),
    "shared.0.attention.k_residual": ("k_residual", lambda model: model.shared[0].attention),
    "shared.0.mlp.gate": ("gate", lambda model: model.shared[0].mlp),
    "calls.1.linear": ("linear", lambda model: model.calls[1]),
}


def with_low_rank(sums):
    """A model with low-rank sums in some places, or with the same matrices formed."""
    model = random_model(SMALL, jnp.float64)
    for seed, (attribute, owner) in enumerate(PLACES.values()):
        base = getattr(owner(model), attribute)
        (o, i), r, scale = base.shape, 3, 0.25
        a, b = normal(r, i, seed=seed), normal(o, r, seed=seed)
        if sums:
            parts = (nnx.Param(array, axes=axes) for array, axes in ((a, ("rank", None)), (b, (None, "rank"))))
            setattr(owner(model), attribute, LowRankSum(base, *parts, scale))
        else:
            base[...] = base[...] + scale * b @ a
    return model


def test_a_low_rank_sum_is_the_matrix_it_stands_for_in_every_pass(x64):
    sums, formed, tokens = with_low_rank(True), with_low_rank(False), random_tokens(SMALL, 2, 9)
    assert_close(forward(sums, tokens), forward(formed, tokens), 1e-12)
    logits = []
    for model in (sums, formed):
        _, cache = prefill(model, tokens[:, :5], capacity=9)
        logits.append(decode_step(model, tokens[:, 5], cache)[0])
    assert_close(logits[0], logits[1], 1e-12)


def test_its_parts_have_gradients_by_the_chain_rule(x64):
    """y = (w + s b a) x: the gradient of b is s G a.T, and of a s b.T G, where G is that of the formed matrix."""
    tokens = random_tokens(SMALL, 2, 9)
    found, formed = (
        named_parameters(jax.jit(jax.grad(lambda model: next_token_loss(model, tokens)[0]))(with_low_rank(sums)))
        for sums in (True, False)
    )
    parameters = named_parameters(with_low_rank(True))
    for place in PLACES:
        G, a, b = formed[place][...], parameters[f"{place}.a"][...], parameters[f"{place}.b"][...]
        assert_close(found[f"{place}.base"][...], G, 1e-10)
        assert_close(found[f"{place}.b"][...], 0.25 * G @ a.T, 1e-10)
        assert_close(found[f"{place}.a"][...], 0.25 * b.T @ G, 1e-10)


def test_a_checkpoint_that_has_no_place_for_it_is_not_written(x64, tmp_path):
    with pytest.raises(ValueError, match=re.escape("no tensor of a zamba2 checkpoint holds calls.1.linear.a, ")):
        save_hf(with_low_rank(True), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_parts_that_do_not_fit_are_refused():
    base, a, b = (nnx.Param(jnp.zeros(shape)) for shape in ((4, 6), (2, 6), (4, 3)))
    with pytest.raises(ValueError, match=re.escape("b (4, 3), expected (r, 6) and (4, r) for 4 x 6")):
        LowRankSum(base, a, b, 1.0)
