"""However a step is computed, loss and gradient are those of the plain pass."""

import dataclasses
from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tests.helpers import SMALL, TINY, assert_close, random_model, random_tokens
from zamba2_jax import next_token_loss
from zamba2_jax.data.batches import Batch
from zamba2_jax.models.layers import LayerOptions
from zamba2_jax.ops.backend import default_backend
from zamba2_jax.parallel.mesh import make_mesh, shard_model
from zamba2_jax.train.optimizer import AdamW
from zamba2_jax.train.step import StepConfig, evaluate, init_state, loss_and_gradient, step_backend, train_step

# Groups of all kinds: without a call, with one of either block, and as short and as long as the longest.
CONFIG = dataclasses.replace(TINY, num_layers=6, hybrid_layer_ids=(1, 3, 5), num_shared_blocks=2, vocab_size=32)
ROWS, LENGTH = 8, 11


@cache
def packed():
    """Rows with as many tokens to predict as their number, so that parts of the batch weigh differently."""
    time = np.arange(LENGTH)
    segment_ids = np.stack(
        [np.where(time <= row, 1, np.where(time < LENGTH - 2, 2 * (row % 2), 0)) for row in range(ROWS)]
    )
    weights = np.random.default_rng(0).uniform(size=segment_ids.shape) * (np.arange(LENGTH) % 4 != 2)
    tokens = np.asarray(random_tokens(CONFIG, ROWS, LENGTH))
    return Batch(tokens, segment_ids.astype(np.int32), weights.astype(np.float32))


@cache
def plain():
    """The plain pass in float64."""
    with jax.enable_x64(True):
        model, batch = random_model(CONFIG, jnp.float64), packed()

        def loss(model):
            return next_token_loss(model, *map(jnp.asarray, (batch.tokens, batch.segment_ids, batch.weights)))[0]

        return jax.device_get(jax.jit(jax.value_and_grad(loss))(model))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"scan_layers": True, "remat": "none"}, marks=pytest.mark.slow),
        {"scan_layers": True, "remat": "layer", "microbatches": 4, "loss_chunk": 3},
        {"scan_layers": True, "remat": "matmuls", "microbatches": 2},
        pytest.param({"scan_layers": False, "remat": "layer", "microbatches": 8}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_loss_and_gradient_are_those_of_the_plain_pass(x64, options):
    step = jax.jit(lambda model, batch: loss_and_gradient(model, batch, StepConfig(**options)))
    # In float64 what is left is the order of additions.
    assert_close(step(random_model(CONFIG, jnp.float64), packed()), plain(), 1e-12)


def products_with_weights(model=CONFIG, **options):
    """Products without a batch axis in the program of a gradient, forward, backward and again."""

    def count(jaxpr):
        own = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
        inner = sum(count(inner) for eqn in jaxpr.eqns for inner in jaxprs_in_params(eqn.params))
        return inner + sum(eqn.params["dimension_numbers"][1] == ((), ()) for eqn in own)

    config = StepConfig(compute_dtype="bfloat16", **options)
    step = jax.make_jaxpr(lambda model, batch: loss_and_gradient(model, batch, config))
    return count(step(random_model(model), packed()).jaxpr)


def test_what_is_kept_is_not_computed_again():
    kept, again = (products_with_weights(remat=remat, scan_layers=False) for remat in ("matmuls", "layer"))
    # z, x, (B, C), dt; q, k, v, their six adapters, o, and gate, up, their three adapters and down. The last product
    # of either gives what is kept anyway. Those of the embeddings, per block, are left to the compiler to drop: nothing
    # reads them.
    per_layer, per_call, per_block = 4, 16, 3
    assert kept == products_with_weights(remat="none", scan_layers=False)
    repeated = CONFIG.num_layers * per_layer + CONFIG.num_calls * per_call + CONFIG.num_shared_blocks * per_block
    assert again == kept + repeated


def test_of_sums_of_products_no_terms_are_kept():
    tokens = jnp.asarray(packed().tokens)

    def kept(model):
        options = LayerOptions(remat="matmuls", dtype=jnp.bfloat16, training=True)
        return jax.vjp(lambda model: model.run(tokens, options=options).h, model)[1]

    leaves = jax.tree.leaves(jax.eval_shape(kept, random_model(CONFIG)))
    counts = Counter((leaf.shape[2:], leaf.dtype.name) for leaf in leaves if leaf.shape[:2] == (ROWS, LENGTH))
    heads, ffn = (CONFIG.attention_heads, CONFIG.attention_head_dim), (CONFIG.ffn_size,)
    assert counts[heads, "bfloat16"] == 3 * CONFIG.num_calls  # q, k, v
    assert counts[ffn, "bfloat16"] == 2 * CONFIG.num_calls  # gate, up
    # On CPU products are float32 before they are rounded: z and x, and (B, C), which is as wide as the MLP here.
    assert counts[(CONFIG.inner_size,), "float32"] == 2 * CONFIG.num_layers
    assert counts[ffn, "float32"] == CONFIG.num_layers


def test_deep_models_are_scanned_but_for_gpus(monkeypatch):
    deep = dataclasses.replace(CONFIG, num_layers=12)
    unrolled, scanned = (products_with_weights(deep, scan_layers=scan) for scan in (False, True))
    assert scanned < unrolled
    for platform, expected in {"tpu": scanned, "gpu": unrolled}.items():
        monkeypatch.setattr("zamba2_jax.train.step.platform", lambda platform=platform: platform)
        assert products_with_weights(deep) == expected


@pytest.mark.slow
def test_over_a_mesh_too(x64):
    config = dataclasses.replace(CONFIG, mamba_heads=8)
    model, batch, mesh = random_model(config, jnp.float64), packed(), make_mesh(fsdp=2, tensor=2)
    expected = jax.jit(loss_and_gradient)(model, batch)
    options = StepConfig(scan_layers=True, remat="layer", microbatches=2)
    with jax.set_mesh(mesh):
        step = jax.jit(lambda model, batch: loss_and_gradient(model, batch, options))
        assert_close(step(shard_model(model, mesh), batch), expected, 1e-12)


def test_bfloat16_computes_and_float32_keeps():
    model, batch, optimizer = random_model(CONFIG), packed(), AdamW().transformation()
    options = StepConfig(compute_dtype="bfloat16", scan_layers=True, remat="layer")
    state = init_state(model, optimizer)

    def step(state):
        return train_step(state, batch, optimizer=optimizer, schedule=lambda step: 1e-3, config=options)

    lowered = jax.jit(step).lower(state)
    products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert any("xbf16>, tensor" in line for line in products)
    after, metrics = lowered.compile()(state)
    assert [leaf.dtype for leaf in jax.tree.leaves(after)] == [leaf.dtype for leaf in jax.tree.leaves(state)]
    # Between bfloat16's 8 bits and no agreement at all: losses of a random model are about 4.
    expected = plain()[0]
    assert abs(metrics.loss - expected) < 0.1
    assert abs(metrics.loss - expected) > 1e-6
    assert abs(evaluate(model, [batch], options).loss - float(metrics.loss)) < 1e-5


def test_z_loss_adds_the_mean_square_of_the_normalizer_to_what_is_minimised(x64):
    model, batch = random_model(SMALL, jnp.float64), packed()
    tokens, segment_ids = map(jnp.asarray, (batch.tokens, batch.segment_ids))
    same = (segment_ids[:, :-1] == segment_ids[:, 1:]) & (segment_ids[:, 1:] != 0)
    same *= batch.weights[:, 1:].astype(np.float64)

    def objective(model):
        logits = model(tokens, segment_ids)[:, :-1]
        normalizer = jnp.log(jnp.exp(logits).sum(axis=-1))
        nll = normalizer - jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        loss = jnp.sum(nll * same) / same.sum()
        return loss + 0.3 * jnp.sum(normalizer**2 * same) / same.sum(), loss

    found = jax.jit(lambda model: loss_and_gradient(model, batch, StepConfig(z_loss=0.3)))(model)
    (_, loss), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(model)
    assert_close(found, (loss, gradient), 1e-11)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"microbatches": 0}, "microbatches=0: expected an integer >= 1"),
        ({"remat": "all"}, "remat='all': expected one of none, layer, matmuls"),
        ({"compute_dtype": "float16"}, "compute_dtype='float16': expected one of None, float32, bfloat16"),
        ({"z_loss": -1.0}, "z_loss=-1.0: expected a finite number >= 0"),
        ({"loss_chunk": 0}, "loss_chunk=0: expected an integer >= 1"),
        ({"scan": "cuda"}, "scan='cuda': expected one of None, xla"),
        ({"attention": "flash"}, "attention='flash': expected one of None, xla, splash"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        StepConfig(**options)


def test_parts_that_do_not_divide_the_batch_are_refused():
    batch = packed()
    with pytest.raises(ValueError, match="microbatches=3 does not divide the batch of 8 rows"):
        jax.eval_shape(lambda model: loss_and_gradient(model, batch, StepConfig(microbatches=3)), random_model(CONFIG))


def test_implementations_are_those_that_are_chosen():
    default = default_backend(jnp.float32)
    assert step_backend(random_model(SMALL), StepConfig()) == default
    chosen = StepConfig(scan="sequential", attention="plain")
    backend = dataclasses.replace(default, scan="sequential", attention="plain")
    assert step_backend(random_model(SMALL), chosen) == backend
