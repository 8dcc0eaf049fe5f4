import pytest

pytest.importorskip("torch", reason="parity compares with PyTorch, which is not installed")
pytest.importorskip("transformers", reason="parity compares with transformers, which is not installed")
