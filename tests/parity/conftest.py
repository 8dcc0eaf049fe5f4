import os

import jax
import pytest

from tests.helpers import compiled_anew

pytest.importorskip("torch", reason="parity compares with PyTorch, which is not installed")
pytest.importorskip("transformers", reason="parity compares with transformers, which is not installed")


@pytest.fixture(autouse=True, scope="package")
def optimized(tmp_path_factory):
    """Programs as users get them, of this run: optimising changes the order of sums, and so their rounding."""
    run = tmp_path_factory.getbasetemp()
    run = run.parent if "PYTEST_XDIST_WORKER" in os.environ else run
    with compiled_anew(run / "parity-programs"):
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", True)
