import importlib

import pytest


@pytest.fixture
def torch_in_float64(monkeypatch):
    """transformers computes norms and scans in float32; then in float64."""
    torch = importlib.import_module("torch")
    importlib.import_module("safetensors.torch")  # it lists dtypes when it is first imported
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
