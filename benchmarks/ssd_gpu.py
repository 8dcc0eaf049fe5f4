"""Are the GPU kernels of the scan right on a GPU, and how fast are they next to XLA's and mamba_ssm's?

On a machine with an NVIDIA GPU. First compares results and gradients with the recurrence in float32, at the shapes of
the released models; then times the scan in bfloat16, forward and with the gradient, and writes a JSON file beside this
one, with a table per kind of device. Where `mamba_ssm` can be imported (with torch and triton) it is timed too, at its
own chunk size of 256.

    python benchmarks/ssd_gpu.py [--models zamba2-7b ...] [--shapes 4x4096 ...] [--no-xla] [--tunings]

Two times of a call: what its kernels take on the device, by CUPTI, and what passes on the clock, of five calls one
after the other. The second has the host's part in it, which is no one's inside of a larger compiled program.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from zamba2_jax import preset

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory beside JAX

import jax
import jax.numpy as jnp
import numpy as np

from zamba2_jax.files import write_json
from zamba2_jax.ops import ssd
from zamba2_jax.ops.decay import log_decays
from zamba2_jax.ops.ssd_pallas_gpu import Tuning, ssd_pallas_gpu

OUTPUT = Path(__file__).with_suffix(".json")
ROUNDS, CALLS = 3, 5
NAMES = ("x", "dt", "A", "B", "C", "D")
LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}
TUNINGS = {
    f"pallas {', '.join(f'{name}={value}' for name, value in options.items())}": Tuning(**options)
    for options in (
        {"num_stages": 2},
        {"num_stages": 3},
        {"num_warps": 8},
        {"chunk": 128, "num_warps": 8, "num_stages": 2},
        {"multiprocessors": 66, "num_stages": 2},
        {"multiprocessors": 264, "num_stages": 2},
    )
}
Call = Callable[[], Any]
Pair = tuple[jax.stages.Compiled, jax.stages.Compiled]
Scan = Callable[..., tuple[jax.Array, jax.Array]]


class Times(NamedTuple):
    """Milliseconds of a call, forward and with the gradient: on the device, and on the clock."""

    forward: float
    with_gradient: float
    forward_clock: float
    with_gradient_clock: float


def arguments(model: str, rows: int, tokens: int, dtype: str) -> dict[str, jax.Array]:
    """Inputs of the scan as in a model: dt of 0.001 to 0.1, A of -1 to -16."""
    config, keys = preset(model), iter(jax.random.split(jax.random.key(0), 5))
    h, p, g, n = config.mamba_heads, config.mamba_head_dim, config.ngroups, config.d_state
    return {
        "x": jax.random.normal(next(keys), (rows, tokens, h, p), dtype),
        "dt": 10 ** jax.random.uniform(next(keys), (rows, tokens, h), minval=-3.0, maxval=-1.0),
        "A": -jax.random.uniform(next(keys), (h,), minval=1.0, maxval=16.0),
        "B": jax.random.normal(next(keys), (rows, tokens, g, n), dtype),
        "C": jax.random.normal(next(keys), (rows, tokens, g, n), dtype),
        "D": jnp.ones(h, jnp.float32),
    }


def kernels(x, dt, A, B, C, D, *, tuning: Tuning | None = None) -> tuple[jax.Array, jax.Array]:
    """`ssd_pallas_gpu` with the arguments of `ssd`."""
    return ssd_pallas_gpu(x, dt, log_decays(dt, A), B, C, D, None, tuning=tuning)


def with_gradient(function: Callable[..., Any], *inputs: jax.Array) -> Any:
    """Results and gradients, by all inputs, of the results weighed by themselves, at no further cost."""
    outputs, pull = jax.vjp(function, *inputs)
    return outputs, pull(outputs)


def check(model: str, dtype: str) -> dict[str, float]:
    """Relative error, by norms, of y, the state and every gradient, on a ragged length."""
    inputs = arguments(model, 2, 1000, dtype).values()
    exact = [a.astype(jnp.float32) for a in inputs]
    expected = jax.jit(partial(with_gradient, partial(ssd, implementation="sequential")))(*exact)
    got = jax.jit(partial(with_gradient, kernels))(*inputs)
    return dict(zip(("y", "state", *(f"d{name}" for name in NAMES)), differences(got, expected), strict=True))


def differences(got: Any, expected: Any) -> list[float]:
    """Of every array from the one expected, by norms."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return [float(np.linalg.norm(np.float64(a) - np.float64(e)) / np.linalg.norm(np.float64(e))) for a, e in pairs]


def compiled(function: Callable[..., Any], inputs: Any) -> Pair:
    """Of arrays or shapes by name: the function, and the function with its gradient."""
    forward, both = (jax.jit(f).lower(*inputs.values()).compile() for f in (function, partial(with_gradient, function)))
    return forward, both


def of_jax(function: Callable[..., Any], inputs: dict[str, jax.Array]) -> tuple[Call, Call]:
    """One call forward, and one with the gradient, compiled."""
    return of_programs(compiled(function, inputs), inputs)


def of_programs(pair: Pair, inputs: dict[str, jax.Array]) -> tuple[Call, Call]:
    """Calls of both with these inputs."""
    forward, both = pair
    return partial(forward, *inputs.values()), partial(both, *inputs.values())


def of_mamba_ssm(inputs: dict[str, jax.Array]) -> tuple[Call, Call]:
    """The same of mamba_ssm's kernels."""
    import torch
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, dt, A, B, C, D = (torch.from_dlpack(a).clone().requires_grad_() for a in inputs.values())

    def forward() -> Any:
        return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256, D=D, return_final_states=True)

    def both() -> Any:
        outputs = forward()
        return torch.autograd.grad(outputs, (x, dt, A, B, C, D), [a.detach() for a in outputs])

    def without_graph() -> Any:
        with torch.no_grad():
            return forward()

    return without_graph, both


def wait(results: Any) -> None:
    """Until all that was asked for is done."""
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.synchronize()
    jax.block_until_ready([leaf for leaf in jax.tree.leaves(results) if isinstance(leaf, jax.Array)])


def on_clock(call: Call) -> float:
    """Milliseconds of one call among several in a row, the median of rounds."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            results = call()
        wait(results)
        times.append((time.perf_counter() - start) / CALLS * 1e3)
    return statistics.median(times)


def on_device(call: Call) -> float:
    """Milliseconds that the kernels of one call take, the mean of several."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(CALLS):
                results = call()
            wait(results)
        [path] = Path(folder).rglob("*.xplane.pb")
        planes = [plane for plane in jax.profiler.ProfileData.from_file(str(path)).planes if "GPU" in plane.name]
        streams = [line for plane in planes for line in plane.lines if line.name.startswith("Stream")]
        return sum(event.duration_ns for line in streams for event in line.events) / CALLS / 1e6


def programs(model: str, rows: int, tokens: int, scans: dict[str, Scan]) -> dict[str, Pair]:
    """Scans compiled for a shape, by name."""
    shapes = jax.eval_shape(partial(arguments, model, rows, tokens, "bfloat16"))
    inputs = {name: shapes[name] for name in NAMES}  # eval_shape sorts them
    with ThreadPoolExecutor() as pool:
        return dict(zip(scans, pool.map(partial(compiled, inputs=inputs), scans.values()), strict=True))


def contenders(model: str, rows: int, tokens: int, scans: dict[str, Pair]) -> dict[str, tuple[Call, Call]]:
    """By name, all called once; without those that do not fit into memory."""
    inputs, found = arguments(model, rows, tokens, "bfloat16"), {}
    for name, pair in scans.items():
        calls = of_programs(pair, inputs)
        try:
            for call in calls:
                wait(call())
            found[name] = calls
        except jax.errors.JaxRuntimeError as error:
            print(f"    {name} left out: {str(error).splitlines()[0][:120]}")
    if importlib.util.find_spec("mamba_ssm"):
        found["mamba_ssm"] = of_mamba_ssm(inputs)
        for call in found["mamba_ssm"]:
            wait(call())  # tunes itself
    return found


def main() -> None:
    """Prints the tables and writes the file; exits with 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["zamba2-7b", "zamba2-1.2b", "zamba2-2.7b"])
    parser.add_argument(
        "--shapes", nargs="+", default=["1x2048", "2x2048", "1x4096", "4x4096", "8x2048", "1x16384", "8x16384"]
    )
    parser.add_argument("--no-xla", action="store_true", help="without plain XLA, which takes long to compile")
    parser.add_argument("--tunings", action="store_true", help="other sizes of the kernels too")
    options = parser.parse_args()
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        sys.exit("ssd_gpu.py needs an NVIDIA GPU: JAX sees none here")

    results: dict[str, Any] = {"jax": jax.__version__, "errors": {}, "milliseconds": []}
    devices = (json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}) | {device.device_kind: results}
    wrong = False
    for model in options.models:
        for dtype, limit in LIMITS.items():
            errors = results["errors"][f"{model} {dtype}"] = check(model, dtype)
            wrong |= not all(error <= limit for error in errors.values())  # NaN is wrong too
            print(f"{model} {dtype:9}", " ".join(f"{name} {error:.1e}" for name, error in errors.items()), flush=True)
    write_json(OUTPUT, devices)
    if wrong:
        sys.exit(f"errors above {LIMITS}: nothing timed")

    scans: dict[str, Scan] = {"pallas": kernels}
    if not options.no_xla:
        scans["xla"] = partial(ssd, implementation="xla")
    if options.tunings:
        scans |= {name: partial(kernels, tuning=tuning) for name, tuning in TUNINGS.items()}
    shapes = [(int(rows), int(tokens)) for rows, tokens in (shape.split("x") for shape in options.shapes)]
    print("ms on the device, forward and with the gradient, and over those of pallas; ms on the clock")
    for model in options.models:
        with ThreadPoolExecutor() as pool:
            compiling = [pool.submit(programs, model, *shape, scans) for shape in shapes]
        for (rows, tokens), ready in zip(shapes, compiling, strict=True):
            calls = contenders(model, rows, tokens, ready.result())
            times = {name: Times(*map(on_device, pair), *map(on_clock, pair)) for name, pair in calls.items()}
            rows_of_table = {name: value._asdict() for name, value in times.items()}
            results["milliseconds"].append({"model": model, "rows": rows, "tokens": tokens, **rows_of_table})
            write_json(OUTPUT, devices)
            print(f"{model} {rows} x {tokens}")
            for name, (forward, both, *clock) in times.items():
                ratios = (a / b for a, b in zip((forward, both), times["pallas"], strict=False))
                columns = *(f"{a:9.3f}" for a in (forward, both)), *(f"{a:7.2f}" for a in ratios)
                print(f"    {name:40}", *columns, *(f"{a:9.3f}" for a in clock), flush=True)


if __name__ == "__main__":
    main()
