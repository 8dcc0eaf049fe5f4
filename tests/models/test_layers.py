import pytest

from zamba2_jax import preset
from zamba2_jax.models.layers import groups
from zamba2_jax.models.zamba2.config import HybridPlan

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
