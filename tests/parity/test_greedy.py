"""The engine continues prompts as `generate` of transformers does, token by token."""

import dataclasses

import numpy as np
import pytest

from zamba2_jax.checkpoint.hf import save_hf
from zamba2_jax.parity import ours, reference
from zamba2_jax.parity.ours import random_model
from zamba2_jax.parity.variants import VARIANTS

NEW_TOKENS = 64


@pytest.mark.parametrize(
    "name",
    [
        "7b-miniature",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("1.2b-miniature", "2.7b-miniature", "untied-head")),
    ],
)
def test_greedy_tokens_are_those_of_transformers(name, tmp_path):
    """Two models, five ragged prompts: one batch padded at the left there, an engine of eight slots here."""
    case = dataclasses.replace(VARIANTS[name], batch=5, seq=21, left_padding=(0, 5, 20, 1, 13))
    for seed in (0, 1):
        model, batch = random_model(case.config, seed=seed), case.tokens(seed)
        directory = tmp_path / str(seed)
        save_hf(model, directory)
        theirs = reference.greedy(
            reference.load(directory, case.config, "float32", reference.CHUNK_SIZE), batch, NEW_TOKENS
        )
        np.testing.assert_array_equal(ours.greedy(model, batch, NEW_TOKENS), theirs)
        assert len(np.unique(theirs)) > 5
