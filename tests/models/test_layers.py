import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.helpers import SMALL, random_model, random_tokens
from zamba2_jax import preset
from zamba2_jax.data.batches import Batch
from zamba2_jax.models.layers import groups
from zamba2_jax.nn.config import HybridPlan
from zamba2_jax.nn.linear import LowRankSum
from zamba2_jax.train.step import SCANNED_FROM, StepConfig, loss_and_gradient

# Layers of the groups, by hand from the published layer ids.
SIZES = {
    "zamba2-1.2b": [5, 6, 6, 6, 6, 6, 3],
    "zamba2-2.7b": [6, 6, 6, 6, 6, 6, 6, 5, 4, 3],
    "zamba2-7b": [6, 5, *[6] * 11, 4],
}


@pytest.mark.parametrize("name", SIZES)
def test_groups_of_the_published_models(name):
    config = preset(name)
    found = groups(config)
    assert [len(group.layers) for group in found] == SIZES[name]
    assert [i for group in found for i in group.layers] == list(range(config.num_layers))
    blocks = config.num_shared_blocks
    assert [group.call for group in found] == [None, *[HybridPlan(i, i % blocks) for i in range(config.num_calls)]]


def test_layers_that_are_not_alike_are_not_scanned(x64):
    """As where one matrix of one layer is a sum: the default runs them one by one, to ask for the scan is an error."""
    config = dataclasses.replace(SMALL, num_layers=SCANNED_FROM, hybrid_layer_ids=(1,))
    model = random_model(config, jnp.float64)
    mixer = model.layers[3].mamba
    a, b = (
        nnx.Param(jnp.zeros(shape), axes=(None, None)) for shape in ((2, mixer.in_z.shape[1]), (mixer.in_z.shape[0], 2))
    )
    mixer.in_z = LowRankSum(mixer.in_z, a, b, 1.0)
    batch = Batch(tokens=random_tokens(config, 1, 6), segment_ids=jnp.ones((1, 6), int))
    assert jax.eval_shape(loss_and_gradient, model, batch)[0].shape == ()
    with pytest.raises(ValueError, match="scan=True: layers have other parameters than each other"):
        jax.eval_shape(lambda *given: loss_and_gradient(*given, StepConfig(scan_layers=True)), model, batch)
