"""A sharded run is the run on one device, on eight fake ones."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers import SMALL, TINY, assert_close, random_model, random_tokens
from zamba2_jax import Zamba2, capture, next_token_loss
from zamba2_jax.data.batches import Batch
from zamba2_jax.nn.parameter import named_parameters
from zamba2_jax.parallel.mesh import MESH_AXES, check_mesh, constrain, gather_parameters, make_mesh, shard_model
from zamba2_jax.train.optimizer import AdamW
from zamba2_jax.train.step import StepConfig, compile_train_step, eval_step, init_state
from zamba2_jax.train.step import loss_and_gradient as step_gradient

# What eight devices divide; all sizes different, and 56 nothing but the vocabulary.
EIGHT = dataclasses.replace(
    TINY,
    hidden_size=24,
    num_layers=1,
    hybrid_layer_ids=(0,),
    num_shared_blocks=1,
    mamba_heads=16,
    attention_heads=8,
    kv_heads=8,
    ffn_size=40,
    vocab_size=56,
)
UNTIED = dataclasses.replace(EIGHT, ngroups=1, tie_embeddings=False)
LENGTH = 32

FAST = [((1, 2, 2, 2), EIGHT), ((2, 2, 2, 1), UNTIED)]
SLOW = [
    (sizes, config)
    for sizes in [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 1, 8), (2, 2, 2, 1), (1, 2, 2, 2)]
    for config in (EIGHT, UNTIED)
    if (sizes, config) not in FAST
]

# By hand, for a model split by fsdp and tensor: what RULES is to say.
PLACES = {
    "embed": P("tensor", "fsdp"),
    "norm": P(None),
    "head": P("tensor", "fsdp"),
    "layers.1.norm": P(None),
    "layers.1.mamba.in_z": P("tensor", "fsdp"),
    "layers.1.mamba.in_x": P("tensor", "fsdp"),
    "layers.1.mamba.in_bc": P(None, "fsdp"),
    "layers.1.mamba.in_dt": P("tensor", "fsdp"),
    "layers.1.mamba.conv_x": P(None, "tensor"),
    "layers.1.mamba.conv_bc": P(None, None),
    "layers.1.mamba.conv_x_bias": P("tensor"),
    "layers.1.mamba.conv_bc_bias": P(None),
    "layers.1.mamba.A_log": P("tensor"),
    "layers.1.mamba.D": P("tensor"),
    "layers.1.mamba.dt_bias": P("tensor"),
    "layers.1.mamba.norm": P("tensor"),
    "layers.1.mamba.out": P("fsdp", "tensor"),
    "shared.0.norm": P(None),
    "shared.0.mlp_norm": P(None),
    "shared.0.attention.q_residual": P("tensor", "fsdp"),
    "shared.0.attention.q_embedded": P("tensor", "fsdp"),
    "shared.0.attention.k_residual": P("tensor", "fsdp"),
    "shared.0.attention.k_embedded": P("tensor", "fsdp"),
    "shared.0.attention.v_residual": P("tensor", "fsdp"),
    "shared.0.attention.v_embedded": P("tensor", "fsdp"),
    "shared.0.attention.o": P("fsdp", "tensor"),
    "shared.0.mlp.gate": P("tensor", "fsdp"),
    "shared.0.mlp.up": P("tensor", "fsdp"),
    "shared.0.mlp.down": P("fsdp", "tensor"),
    "calls.1.attention.q_a": P(None, "fsdp"),
    "calls.1.attention.q_b": P(("tensor", "fsdp"), None),
    "calls.1.mlp.a": P(None, "fsdp"),
    "calls.1.mlp.gate_b": P(("tensor", "fsdp"), None),
    "calls.1.mlp.up_b": P(("tensor", "fsdp"), None),
    "calls.1.linear": P(None, "fsdp"),
}


def test_every_parameter_has_its_place():
    config = dataclasses.replace(SMALL, tie_embeddings=False)
    mesh = make_mesh(fsdp=2, tensor=2)
    placed = named_parameters(shard_model(random_model(config), mesh))
    for name, spec in PLACES.items():
        array = placed[name][...]
        assert array.sharding == NamedSharding(mesh, spec), name
        split = 2 ** len(jax.tree.leaves(tuple(spec)))
        assert array.addressable_shards[0].data.size == array.size // split, name


def test_a_fresh_model_begins_in_its_places_with_the_values_it_has_on_one_device():
    config = dataclasses.replace(SMALL, tie_embeddings=False)
    alone = named_parameters(Zamba2(config, rngs=nnx.Rngs(3)))
    mesh = make_mesh(fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        placed = named_parameters(Zamba2(config, rngs=nnx.Rngs(3)))
    for name, spec in PLACES.items():
        array = placed[name][...]
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim), name
        np.testing.assert_array_equal(array, alone[name][...], err_msg=name)


def test_parameters_are_gathered_along_fsdp_alone_and_their_gradients_are_not():
    mesh = make_mesh(fsdp=2, tensor=2)
    model = shard_model(random_model(dataclasses.replace(SMALL, tie_embeddings=False)), mesh)

    def gathered_and_cotangent(model):
        gathered, pull = jax.vjp(gather_parameters, model)
        return gathered, pull(gathered)[0]

    with jax.set_mesh(mesh):
        gathered, cotangent = jax.jit(gathered_and_cotangent)(model)
    for name, spec in PLACES.items():
        whole = P(*("tensor" if "tensor" in (axes or ()) else None for axes in spec))
        for tree, expected in ((gathered, whole), (cotangent, spec)):
            array = named_parameters(tree)[name][...]
            assert array.sharding.is_equivalent_to(NamedSharding(mesh, expected), array.ndim), name
            np.testing.assert_array_equal(array, named_parameters(model)[name][...])


def mesh_of(sizes):
    return make_mesh(**dict(zip(MESH_AXES, sizes, strict=True)))


def packed_rows():
    """Eight rows of tokens, and documents that end at, before and after the edges of 2 and of 8 parts of a row."""
    runs = [
        [(1, 32)],
        [(1, 4), (2, 12), (0, 4), (3, 12)],  # at edges, and a part that is padding
        [(0, 5), (1, 10), (2, 2), (1, 15)],  # across them, an id that comes back
        [(0, 32)],
        [(1, 3), (2, 2), (3, 3), (4, 7), (5, 2), (6, 15)],
        [(1, 7), (0, 10), (2, 15)],  # a state that passes over padding to nobody
        [(1, 1)] + [(i, 1) for i in range(2, 33)],
        [(1, 15), (2, 16), (0, 1)],
    ]
    rows = [[each for each, count in row for _ in range(count)] for row in runs]
    return random_tokens(EIGHT, 8, LENGTH), jnp.asarray(rows, jnp.int32)


def weighted_rows():
    """As a batch, in which a third of the tokens is context alone."""
    weights = np.random.default_rng(1).uniform(size=(8, LENGTH)) * (np.arange(LENGTH) % 3 != 1)
    return Batch(*packed_rows(), weights.astype(np.float32))


@jax.jit
def loss_and_gradient(model, tokens, segment_ids):
    return jax.value_and_grad(lambda model: next_token_loss(model, tokens, segment_ids, chunk_size=5), has_aux=True)(
        model
    )


@pytest.mark.parametrize(
    ("sizes", "config"),
    [pytest.param(*case) for case in FAST] + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW],
    ids=lambda value: f"groups={value.ngroups}" if value in (EIGHT, UNTIED) else str(value),
)
def test_loss_and_gradient_are_those_of_one_device(x64, sizes, config):
    model, (tokens, segment_ids) = random_model(config, jnp.float64), packed_rows()
    expected = loss_and_gradient(model, tokens, segment_ids)
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        sharded = shard_model(model, mesh)
        compiled = loss_and_gradient.lower(sharded, tokens, segment_ids).compile()
        # Sums are divided over devices: the order of additions differs, nothing else.
        assert_close(compiled(sharded, tokens, segment_ids), expected, 1e-12)
    whole_vocabulary = re.findall(r"f64\[(?:\d+,)*56[,\]]", compiled.as_text())
    assert bool(whole_vocabulary) == (mesh.shape["tensor"] == 1)


def test_layers_by_a_scan_are_those_of_one_device(x64):
    config = dataclasses.replace(EIGHT, num_layers=2, hybrid_layer_ids=(0, 1))
    model, batch = random_model(config, jnp.float64), weighted_rows()
    options = StepConfig(scan_layers=True, remat="layer")
    step = jax.jit(lambda model: (step_gradient(model, batch, options), eval_step(model, batch, options)))
    expected, mesh = step(model), mesh_of((1, 2, 2, 2))
    with jax.set_mesh(mesh):
        assert_close(step(shard_model(model, mesh)), expected, 1e-12)


def test_gradients_of_rows_on_devices_are_summed_once(x64):
    """On a mesh of rows alone, in parts: the numbers of one device, and no sum over devices for each part."""
    model, batch = random_model(EIGHT, jnp.float64), weighted_rows()
    step = jax.jit(lambda model: step_gradient(model, batch, StepConfig(microbatches=2)))
    expected, mesh = step(model), make_mesh(data=4)
    with jax.set_mesh(mesh):
        sharded = shard_model(model, mesh)
        compiled = step.lower(sharded).compile()
        assert_close(compiled(sharded), expected, 1e-12)
        with pytest.raises(ValueError, match="microbatches=4 on each of 4 devices does not divide the batch of 8 rows"):
            jax.eval_shape(lambda model: step_gradient(model, batch, StepConfig(microbatches=4)), sharded)
    places = {part.split()[0] for part in compiled.as_text().split("\n\n") if " all-reduce(" in part}
    assert places == {"ENTRY"}


def test_what_flows_inside_is_that_of_one_device(x64):
    """Every tap, the states after the rows too, over all axes but data, without documents."""
    model, tokens = random_model(UNTIED, jnp.float64), random_tokens(UNTIED, 2, 12)
    expected = jax.jit(capture)(model, tokens)
    mesh = make_mesh(fsdp=2, tensor=2, sequence=2)
    with jax.set_mesh(mesh):
        assert_close(jax.jit(capture)(shard_model(model, mesh), tokens), expected, 1e-12)


@pytest.mark.slow
def test_a_long_sequence_over_eight_devices_is_that_of_one():
    """65,536 tokens in float32, in a document that ends in the middle of a part, and one over all others."""
    config = dataclasses.replace(
        EIGHT, hidden_size=8, mamba_heads=4, attention_heads=1, kv_heads=1, d_state=6, ffn_size=12
    )
    model, tokens = random_model(config), random_tokens(config, 1, 2**16)
    segment_ids = jnp.where(jnp.arange(2**16) < 12_345, 1, 2)[None]
    expected = loss_and_gradient(model, tokens, segment_ids)
    mesh = make_mesh(sequence=8)
    with jax.set_mesh(mesh):
        assert_close(loss_and_gradient(shard_model(model, mesh), tokens, segment_ids), expected, 1e-5)


def test_the_optimizer_is_placed_as_the_parameters_are():
    mesh = make_mesh(fsdp=4, tensor=2)
    with jax.set_mesh(mesh):
        model = shard_model(random_model(EIGHT), mesh)
        _, adam, _ = init_state(model, AdamW().transformation()).opt_state
    for moments in (adam.mu, adam.nu):
        for name, parameter in named_parameters(moments).items():
            expected = named_parameters(model)[name][...]
            assert parameter[...].sharding.is_equivalent_to(expected.sharding, expected.ndim), name


@pytest.mark.slow
def test_training_steps_are_those_of_one_device():
    model, optimizer = random_model(EIGHT), AdamW().transformation()
    batch = Batch(*map(np.asarray, packed_rows()))

    def two_steps(model):
        state = init_state(model, optimizer)
        step = compile_train_step(state, batch, optimizer=optimizer, schedule=lambda step: 1e-3)
        for _ in range(2):
            state, metrics = step(state, batch)
        return state, metrics

    state, metrics = two_steps(jax.tree.map(jnp.copy, model))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        sharded = shard_model(model, mesh)
        places = {name: parameter[...].sharding for name, parameter in named_parameters(sharded).items()}
        found, found_metrics = two_steps(sharded)
    assert_close((found.model, found_metrics), (state.model, metrics), 1e-5)
    for name, parameter in named_parameters(found.model).items():
        assert parameter[...].sharding.is_equivalent_to(places[name], parameter.ndim), name


def test_mesh_has_all_axes_and_takes_the_first_devices():
    mesh = make_mesh(tensor=2)
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 2, "sequence": 1}
    assert mesh.devices.ravel().tolist() == jax.devices()[:2]


@pytest.mark.parametrize(
    ("sizes", "needed"), [({"data": 3, "tensor": 3}, 9), ({"fsdp": 0}, 0), ({"data": -1, "tensor": -1}, 1)]
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, needed):
    with pytest.raises(ValueError, match=rf"needs {needed} devices, all sizes >= 1; 8 are there"):
        make_mesh(**sizes)


def test_all_that_a_mesh_does_not_divide_is_named():
    config = dataclasses.replace(EIGHT, vocab_size=57, ffn_size=41)
    mesh = make_mesh(fsdp=2, tensor=2, sequence=2)
    named = r"tensor=2 does not divide the vocabulary, 57; .* the FFN width, 41; .*tensor=2, fsdp=2 .* FFN width, 41$"
    with pytest.raises(ValueError, match=named):
        shard_model(random_model(config), mesh)
    with pytest.raises(ValueError, match=r"data=1, fsdp=2 does not divide the batch, 3; .*sequence=2 .* length, 9$"):
        check_mesh(EIGHT, mesh, batch=3, length=9)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"data=1, fsdp=2 does not divide 'batch' of size 3"):
        jax.eval_shape(next_token_loss, random_model(EIGHT), random_tokens(EIGHT, 3, 8))


def test_heads_are_not_cut():
    """8 columns would divide by 8; 4 heads of 12 do not."""
    config = dataclasses.replace(EIGHT, attention_heads=4, kv_heads=4)
    with pytest.raises(ValueError, match=r"tensor=8 does not divide the attention heads, 4; .* the key heads, 4$"):
        shard_model(random_model(config), make_mesh(tensor=8))


def test_another_mesh_is_refused():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match="expected the axes data, fsdp, tensor, sequence"),
    ):
        constrain(jnp.zeros(2), None)
