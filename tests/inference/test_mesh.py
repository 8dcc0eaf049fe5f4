"""Generation over a mesh says what it says on one device."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.helpers import random_model, random_tokens
from tests.inference.models import UNTIED
from zamba2_jax import Engine, Request, Sampling, generate, score
from zamba2_jax.parallel.mesh import make_mesh, shard_model

CONFIG = dataclasses.replace(UNTIED, num_layers=1, hybrid_layer_ids=(0,))
PROMPTS = [random_tokens(CONFIG, length, seed=length).tolist() for length in (5, 1, 11)]
HOW = [Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=3), Sampling(repetition_penalty=1.3)]


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


def test_tokens_and_scores_are_those_of_one_device(model):
    """Three prompts in four slots over data and tensor; sampled ones too, as their draws do not depend on the mesh."""
    tokens, scores = generate(model, PROMPTS, 6, HOW), score(model, PROMPTS)
    mesh = make_mesh(data=2, tensor=2)
    with jax.set_mesh(mesh):
        sharded = shard_model(model, mesh)
        assert generate(sharded, PROMPTS, 6, HOW) == tokens
        for found, expected in zip(score(sharded, PROMPTS), scores, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_caches_are_divided_and_donated(model):
    mesh = make_mesh(data=2, tensor=2)
    with jax.set_mesh(mesh):
        engine = Engine(shard_model(model, mesh), slots=4, capacity=32)
        empty = engine._rows.cache
        engine.submit(Request(PROMPTS[0], 4))
        next(engine.events())
        cache = engine._rows.cache
    (b, kv, u, p), (_, h, _, n) = empty.calls[0].k.shape, empty.layers[0].ssm.shape
    for each in (empty, cache):
        assert each.calls[0].v.sharding.shard_shape((b, kv, u, p)) == (b // 2, kv // 2, u, p)
        assert each.layers[0].ssm.sharding.shard_shape((b, h, p, n)) == (b // 2, h // 2, p, n)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(empty))
