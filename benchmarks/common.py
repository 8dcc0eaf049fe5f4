"""What the benchmarks share: where they run, clocks, arguments of the scan, processes that take turns, and results.

Importing it, or a benchmark, starts no backend of JAX: `main` says first where JAX is to run.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from zamba2_jax import Zamba2Config, init_model, preset
from zamba2_jax.files import write_json
from zamba2_jax.typing import DTypeLike

RELEASED = ("zamba2-1.2b", "zamba2-2.7b", "zamba2-7b")
CLOCK_ROUNDS, CLOCK_CALLS = 3, 5

Call = Callable[[], Any]


def use_cpu() -> None:
    """Has JAX run on the CPU, here and in processes that are started from here, unless JAX_PLATFORMS says otherwise."""
    jax.config.update("jax_platforms", os.environ.setdefault("JAX_PLATFORMS", "cpu"))


def use_gpu() -> jax.Device:
    """The GPU; ends the process where JAX sees none."""
    try:
        return jax.devices("gpu")[0]
    except RuntimeError:
        sys.exit(f"{Path(sys.argv[0]).name} needs an NVIDIA GPU: JAX sees none here")


def use_absent_tpus() -> None:
    """Lets the TPU compiler work where there is no TPU."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor a TPU that two processes could want


def use_large_pages() -> None:
    """Has malloc ask for large pages in processes started from here (docs/xla-notes.md: large-pages)."""
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")


def machine(*packages: str) -> dict[str, Any]:
    """Where numbers were measured: devices, versions of Python, JAX and these packages."""
    processors = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "device": jax.devices()[0].device_kind,
        "processor": processors[0] if processors else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in ("jax", *packages)},
    }


def option_parser(doc: str | None) -> argparse.ArgumentParser:
    """For a benchmark with that docstring."""
    return argparse.ArgumentParser(description=(doc or "").splitlines()[0])


def load_results(script: str) -> dict[str, Any]:
    """What is in the JSON file beside a script; nothing if there is none."""
    path = Path(script).with_suffix(".json")
    return json.loads(path.read_text()) if path.exists() else {}


def save_results(script: str, results: dict[str, Any] | list[Any]) -> None:
    """Writes the JSON file beside a script."""
    write_json(Path(script).with_suffix(".json"), results)


def wait(results: Any) -> None:
    """Until all that was asked for is done, of torch on a GPU too."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.synchronize()
    jax.block_until_ready([leaf for leaf in jax.tree.leaves(results) if isinstance(leaf, jax.Array)])


def medians(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median seconds of calls that take turns, so that a busy machine slows all of them, after one each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        wait(call())
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            wait(call())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def median_seconds(call: Call, rounds: int = 5) -> float:
    """Of one call alone, after one to warm up."""
    return medians({"it": call}, rounds)["it"]


def on_clock(call: Call) -> float:
    """Milliseconds of one call among several in a row, the median of rounds: with the host's part in it."""
    times = []
    for _ in range(CLOCK_ROUNDS):
        start = time.perf_counter()
        for _ in range(CLOCK_CALLS):
            results = call()
        wait(results)
        times.append((time.perf_counter() - start) / CLOCK_CALLS * 1e3)
    return statistics.median(times)


def on_device(call: Call) -> float:
    """Milliseconds that the kernels of one call take on a GPU, by CUPTI, the mean of several."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(CLOCK_CALLS):
                results = call()
            wait(results)
        [path] = Path(folder).rglob("*.xplane.pb")
        planes = [plane for plane in jax.profiler.ProfileData.from_file(str(path)).planes if "GPU" in plane.name]
        streams = [line for plane in planes for line in plane.lines if line.name.startswith("Stream")]
        return sum(event.duration_ns for line in streams for event in line.events) / CLOCK_CALLS / 1e6


def gradient(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    """Of (arguments, cotangents of all results), with respect to all arguments."""
    return lambda arguments, cotangents: jax.vjp(function, *arguments)[1](cotangents)


def with_gradient(function: Callable[..., Any], *inputs: jax.Array) -> Any:
    """Results and gradients, by all inputs, of the results weighed by themselves, at no further cost."""
    outputs, pull = jax.vjp(function, *inputs)
    return outputs, pull(outputs)


def differences(got: Any, expected: Any) -> list[float]:
    """Of every array from the one expected, by norms."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return [float(np.linalg.norm(np.float64(a) - np.float64(e)) / np.linalg.norm(np.float64(e))) for a, e in pairs]


def array_bytes(tree: Any) -> int:
    """Bytes of all arrays, or shapes, of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class ScanSizes(NamedTuple):
    """Heads, channels of a head, state and groups of a scan."""

    h: int
    p: int
    n: int
    g: int


def scan_sizes(model: str) -> ScanSizes:
    """Of the scan of a preset."""
    config = preset(model)
    return ScanSizes(config.mamba_heads, config.mamba_head_dim, config.d_state, config.ngroups)


def scan_inputs(b: int, t: int, sizes: ScanSizes, dtype: DTypeLike = "float32") -> dict[str, jax.Array]:
    """Random arguments of `ssd`; dt log-uniform from 0.001 to 0.1 and A from -1 to -16, as initialised."""
    (h, p, n, g), keys = sizes, iter(jax.random.split(jax.random.key(0), 6))
    return {
        "x": jax.random.normal(next(keys), (b, t, h, p), dtype),
        "dt": 10 ** jax.random.uniform(next(keys), (b, t, h), minval=-3.0, maxval=-1.0),
        "A": -jax.random.uniform(next(keys), (h,), minval=1.0, maxval=16.0),
        "B": jax.random.normal(next(keys), (b, t, g, n), dtype),
        "C": jax.random.normal(next(keys), (b, t, g, n), dtype),
        "D": jax.random.normal(next(keys), (h,)),
    }


def weight_bytes(config: Zamba2Config, dtype: DTypeLike) -> tuple[int, int]:
    """Bytes of the weights a token needs, and of those it reads if nothing stays in a cache."""
    model: Any = jax.eval_shape(lambda: init_model(config, rngs=nnx.Rngs(0), dtype=dtype))
    once = [
        (block.attention.q_embedded, block.attention.k_embedded, block.attention.v_embedded) for block in model.shared
    ]
    each_call = [array_bytes(block) - array_bytes(of_block) for block, of_block in zip(model.shared, once, strict=True)]
    calls = sum(each_call[row.hybrid.block] for row in config.layer_plan if row.hybrid is not None)
    return array_bytes(model), array_bytes(model) - sum(each_call) + calls


class Answer(NamedTuple):
    """What was answered, in how many seconds, and the peak of the process's resident memory meanwhile, in bytes."""

    value: Any
    seconds: float
    memory: int


class Contender:
    """A process of its own, one of several that answer in turns, so that a busy machine slows all sides.

    `make(name, *arguments)`, called there, gives the function that answers.
    """

    def __init__(self, name: str, make: Callable[..., Callable[..., Any]], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, make, name, *arguments), daemon=True)
        self._process.start()
        self.name = name

    def __call__(self, *question: Any) -> Answer:
        """Its answer to the arguments."""
        self._pipe.send(question)
        return self._pipe.recv()

    def close(self) -> None:
        """Ends the process."""
        self._pipe.send(None)
        self._process.join()


def _work(pipe: Connection, make: Callable[..., Callable[..., Any]], *arguments: Any) -> None:
    answer = make(*arguments)
    while (question := pipe.recv()) is not None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory counts from here
        start = time.perf_counter()
        value = answer(*question)
        pipe.send(Answer(value, time.perf_counter() - start, _peak_memory()))


def _peak_memory() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
