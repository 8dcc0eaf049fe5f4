import dataclasses

import numpy as np
import pytest

from tests.helpers import SMALL, random_model
from zamba2_jax.data.batches import Batch

# A plain and a hybrid layer, and biases, so that all there is to train is there.
CONFIG = dataclasses.replace(SMALL, num_layers=2, hybrid_layer_ids=(1,), add_bias_linear=True)


@pytest.fixture
def model():
    return random_model(CONFIG)


@pytest.fixture
def batch():
    random = np.random.default_rng(0)
    segment_ids = np.array([[1] * 7 + [2] * 5, [1] * 10 + [0] * 2], np.int32)
    tokens = random.integers(3, CONFIG.vocab_size, segment_ids.shape, dtype=np.int32)
    return Batch(tokens=np.where(segment_ids != 0, tokens, 0), segment_ids=segment_ids)
