import importlib.util
import os

import jax
import pytest

from tests.helpers import compiled_anew

for name in (
    "torch",
    "transformers",
):  # looked for, not imported, which takes seconds that a core of the tests can do without
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"parity compares with {name}, which is not installed", allow_module_level=True)


@pytest.fixture(autouse=True, scope="package")
def optimized(tmp_path_factory):
    """Optimised programs, of this run: optimising changes the order of sums, and so their rounding.

    The emitters of fusions stay as they are for all tests; see `checked` for programs as users get them.
    """
    run = tmp_path_factory.getbasetemp()
    run = run.parent if "PYTEST_XDIST_WORKER" in os.environ else run
    with compiled_anew(run / "parity-programs"):
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", True)
