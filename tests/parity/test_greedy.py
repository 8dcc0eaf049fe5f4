"""The engine continues prompts as `generate` of transformers does, token by token."""

import dataclasses

import numpy as np
import pytest

from zamba2_jax.checkpoint.hf import save_hf
from zamba2_jax.parity import ours, reference
from zamba2_jax.parity.case import VARIANTS
from zamba2_jax.parity.ours import random_model

NEW_TOKENS = 64


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["1.2b-miniature", "2.7b-miniature", "7b-miniature", "untied-head"])
def test_greedy_tokens_are_those_of_transformers(name, seed, tmp_path):
    """Five ragged prompts: one batch padded at the left there, an engine of eight slots here."""
    case = dataclasses.replace(VARIANTS[name], batch=5, seq=21, left_padding=(0, 5, 20, 1, 13))
    model, batch = random_model(case.config, seed=seed), case.tokens(seed)
    save_hf(model, tmp_path / "model")
    theirs = reference.greedy(
        reference.load(tmp_path / "model", case.config, "float32", reference.CHUNK_SIZE), batch, NEW_TOKENS
    )
    np.testing.assert_array_equal(ours.greedy(model, batch, NEW_TOKENS), theirs)
    assert len(np.unique(theirs)) > 5
