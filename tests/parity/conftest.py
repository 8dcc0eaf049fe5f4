import jax
import pytest

pytest.importorskip("torch", reason="parity compares with PyTorch, which is not installed")
pytest.importorskip("transformers", reason="parity compares with transformers, which is not installed")


@pytest.fixture(autouse=True, scope="package")
def optimized():
    """Programs as users get them: optimising changes the order of sums, and so their rounding."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()
