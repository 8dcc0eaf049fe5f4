import jax
import pytest

from tests.helpers import freshly_compiled

pytest.importorskip("torch", reason="parity compares with PyTorch, which is not installed")
pytest.importorskip("transformers", reason="parity compares with transformers, which is not installed")


@pytest.fixture(autouse=True, scope="package")
def optimized():
    """Programs as users get them: optimising changes the order of sums, and so their rounding."""
    with freshly_compiled():
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", True)
