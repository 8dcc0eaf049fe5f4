"""What holds of a family whatever its layers are, proved for one architecture of it."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers import abstract_model, assert_close, forward, pad_rows, random_model, random_tokens
from zamba2_jax import next_token_loss
from zamba2_jax.data.batches import Batch
from zamba2_jax.models.registry import family_of
from zamba2_jax.nn.parameter import named_parameters
from zamba2_jax.parallel.mesh import make_mesh, shard_model
from zamba2_jax.train.step import StepConfig, loss_and_gradient


def the_table_holds_every_parameter_once(config):
    tensors = family_of(config).tensors(config)
    listed = {part.path: part.size for tensor in tensors for part in tensor.parts}
    assert sum(len(tensor.parts) for tensor in tensors) == len(listed)
    assert listed.keys() == named_parameters(abstract_model(config)).keys()


def documents_stay_apart(config):
    """Packed into a row, and padded at either end; in float64."""
    model = random_model(config, jnp.float64)
    a, b = np.split(np.asarray(random_tokens(config, 9)), [5])
    tokens, ids = pad_rows([a, b], 12, lead=[2, 0])
    tokens, ids = tokens.at[0, 7:11].set(b), ids.at[0, 7:11].set(2)
    logits = forward(model, tokens, ids)
    alone = [forward(model, jnp.asarray(row[None]))[0] for row in (a, b)]
    assert_close(logits[0, 2:7], alone[0], 1e-12)
    assert_close(logits[0, 7:11], alone[1], 1e-12)
    assert_close(logits[1, :4], alone[1], 1e-12)


def a_scan_on_a_mesh_trains_by_the_gradient_of_the_plain_pass(config, sizes):
    """In float64."""
    model, tokens = random_model(config, jnp.float64), random_tokens(config, 4, 16)
    ids = jnp.asarray([[1] * 7 + [2] * 9, [1] * 16, [1] * 12 + [0] * 4, [1] * 3 + [2] * 13])
    expected = jax.jit(jax.value_and_grad(lambda model: next_token_loss(model, tokens, ids)[0]))(model)
    step = StepConfig(scan_layers=True, remat="layer")
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda model: loss_and_gradient(model, Batch(tokens, ids), step))(shard_model(model, mesh))
    assert_close(jax.device_get(found), expected, 1e-11)
