"""A sharded run is the run on one device, on eight fake ones."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers import SMALL, assert_close, forward, random_model, random_tokens
from zamba2_jax.model.parameter import named_parameters
from zamba2_jax.sharding import MESH_AXES, make_mesh, shard_model

MESHES = [{"data": 2, "fsdp": 2, "tensor": 2}, {"sequence": 4, "tensor": 2}]

# By hand, for a model split by fsdp and tensor: what RULES is to say.
PLACES = {
    "embed": P("tensor", "fsdp"),
    "norm": P(None),
    "head": P("fsdp", "tensor"),
    "layers.1.norm": P(None),
    "layers.1.mamba.in_z": P("fsdp", "tensor"),
    "layers.1.mamba.in_x": P("fsdp", "tensor"),
    "layers.1.mamba.in_bc": P("fsdp", None),
    "layers.1.mamba.in_dt": P("fsdp", "tensor"),
    "layers.1.mamba.conv_x": P(None, "tensor"),
    "layers.1.mamba.conv_bc": P(None, None),
    "layers.1.mamba.conv_x_bias": P("tensor"),
    "layers.1.mamba.conv_bc_bias": P(None),
    "layers.1.mamba.A_log": P("tensor"),
    "layers.1.mamba.D": P("tensor"),
    "layers.1.mamba.dt_bias": P("tensor"),
    "layers.1.mamba.norm": P("tensor"),
    "layers.1.mamba.out": P("tensor", "fsdp"),
    "shared.0.norm": P(None),
    "shared.0.mlp_norm": P(None),
    "shared.0.attention.q": P("fsdp", "tensor"),
    "shared.0.attention.k": P("fsdp", "tensor"),
    "shared.0.attention.v": P("fsdp", "tensor"),
    "shared.0.attention.o": P("tensor", "fsdp"),
    "shared.0.mlp.gate": P("fsdp", "tensor"),
    "shared.0.mlp.up": P("fsdp", "tensor"),
    "shared.0.mlp.down": P("tensor", "fsdp"),
    "calls.1.attention.q_a": P("fsdp", None),
    "calls.1.attention.q_b": P(None, "tensor"),
    "calls.1.mlp_a": P("fsdp", None),
    "calls.1.gate_b": P(None, "tensor"),
    "calls.1.up_b": P(None, "tensor"),
    "calls.1.linear": P("fsdp", None),
}


def test_every_parameter_has_its_place():
    config = dataclasses.replace(SMALL, tie_embeddings=False)
    mesh = make_mesh(fsdp=2, tensor=2)
    placed = named_parameters(shard_model(random_model(config), mesh))
    for name, spec in PLACES.items():
        array = placed[name][...]
        assert array.sharding == NamedSharding(mesh, spec), name
        split = 2 ** sum(axis is not None for axis in spec)
        assert array.addressable_shards[0].data.size == array.size // split, name


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_sharded_pass_is_the_pass_on_one_device(x64, sizes):
    model, tokens = random_model(SMALL, jnp.float64), random_tokens(SMALL, 4, 12)
    expected = forward(model, tokens)
    mesh = make_mesh(**sizes)
    sharded = forward(shard_model(model, mesh), jax.device_put(tokens, NamedSharding(mesh, P("data", "sequence"))))
    assert len(sharded.sharding.device_set) == 8
    # Sums are split over devices: the order of additions differs, nothing else.
    assert_close(sharded, expected, 1e-12)


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


def test_a_dimension_that_does_not_divide_is_refused():
    model = random_model(dataclasses.replace(SMALL, vocab_size=33))
    with pytest.raises(ValueError, match="mesh axis 'tensor' of size 2 does not divide 'vocab' of size 33"):
        shard_model(model, make_mesh(tensor=2))
