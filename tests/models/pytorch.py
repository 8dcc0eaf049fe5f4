"""The models of transformers, and how far ours are from them. Tests that import this are skipped without PyTorch."""

import numpy as np
import pytest

from zamba2_jax import save_hf

torch = pytest.importorskip("torch", reason="needs PyTorch, of the parity extra")
transformers = pytest.importorskip("transformers", reason="needs transformers, of the parity extra")


def relative(actual, expected):
    """The norm of the difference over that of what is expected."""
    actual, expected = (np.asarray(array, np.float64) for array in (actual, expected))
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def in_pytorch(model, directory, dtype="float32"):
    """The model as transformers reads it from what `save_hf` writes: every tensor is found, and no other."""
    save_hf(model, directory)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), output_loading_info=True
    )
    assert not any(report.values()), report
    return theirs.eval()


def logits_of(theirs, tokens, segment_ids=None):
    """Of transformers."""
    tokens, mask = (
        None if array is None else torch.tensor(np.asarray(array)).long() for array in (tokens, segment_ids)
    )
    return theirs(tokens, attention_mask=mask).logits
