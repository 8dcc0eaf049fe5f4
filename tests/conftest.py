"""What every test runs under: eight fake CPU devices, and the shapes in every signature checked at every call.

All of it is set in the environment before JAX is imported, so that the processes and the notebooks that tests start
run under the same.
"""

import os
from pathlib import Path

from tests.compiled import CACHE, CACHE_BYTES, FLAGS, shrink

os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS)).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes three quarters of the tests' time, half of that for programs as fast as users get them. Only where
# rounding is measured does it matter: see parity/conftest.py.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import jaxtyping
import pytest
from jax.experimental import topologies

MAPPINGS = 25_000

PACKAGE = Path(__file__).parent.parent / "zamba2_jax"

# Not what has dataclasses that also hold shapes and shardings, under `jax.eval_shape` for one; nor what has no arrays.
UNCHECKED = {"nn/cache.py", "nn/context.py", "models/registry.py"}
CHECKED = [
    ".".join(("zamba2_jax", *file.relative_to(PACKAGE).with_suffix("").parts))
    for floor in ("ops", "nn", "models")
    for file in (PACKAGE / floor).rglob("*.py")
    if str(file.relative_to(PACKAGE)) not in UNCHECKED and file.stem not in ("config", "config_json", "family", "flops")
]
jaxtyping.install_import_hook(
    [*CHECKED, "zamba2_jax.inference.decode", "zamba2_jax.evaluate.score"], "beartype.beartype"
)


def pytest_sessionstart(session):
    if not hasattr(session.config, "workerinput"):  # once, not in every process of pytest-xdist
        shrink(CACHE, CACHE_BYTES)


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Forgets compiled programs before they are too many: each has a dozen mappings of memory.

    Linux lets a process have 65,530 of them by default; the next program that is loaded then ends it.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MAPPINGS:
        jax.clear_caches()


@pytest.fixture
def x64():
    """float64, for tests against oracles: what is left of the difference is not rounding."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def tpu_sharding(monkeypatch):
    """On one device of a TPU that is not there, for which the real compiler compiles."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler, of the tpu extra")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor a TPU that two processes could want
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


@pytest.fixture
def unchecked():
    """Leaves the checking of shapes to the code under test."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
