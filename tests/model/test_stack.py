import pytest

from zamba2_jax.config import Zamba2Config
from zamba2_jax.model.stack import Stretch, stretches

# By hand, from the published layer ids.
EXPECTED = {
    "zamba2-1.2b": [(False, 5, 1), (True, 5, 5), (True, 2, 1)],
    "zamba2-2.7b": [(False, 6, 1), (True, 5, 6), (True, 4, 1), (True, 3, 1), (True, 2, 1)],
    "zamba2-7b": [(False, 6, 1), (True, 4, 1), (True, 5, 11), (True, 3, 1)],
}


@pytest.mark.parametrize("preset", EXPECTED)
def test_stretches_of_the_published_models(preset):
    assert stretches(Zamba2Config.preset(preset)) == [Stretch(*each) for each in EXPECTED[preset]]
