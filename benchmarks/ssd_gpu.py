"""Are the GPU kernels of the scan right on a GPU, and how fast are they next to XLA's and mamba_ssm's?

On a machine with an NVIDIA GPU. First compares results and gradients with the recurrence in float32, at the shapes of
the released models; then times the scan in bfloat16, forward and with the gradient, and writes a JSON file beside this
one, with a table per kind of device. Where `mamba_ssm` can be imported (with torch and triton) it is timed too, at its
own chunk size of 256.

    python benchmarks/ssd_gpu.py [--models zamba2-7b ...] [--shapes 4x4096 ...] [--no-xla] [--tunings]

Two times of a call: what its kernels take on the device, by CUPTI, and what passes on the clock, of five calls one
after the other. The second has the host's part in it, which is no one's inside of a larger compiled program.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from common import (
    Call,
    differences,
    load_results,
    on_clock,
    on_device,
    option_parser,
    save_results,
    scan_inputs,
    scan_sizes,
    use_gpu,
    wait,
    with_gradient,
)

from zamba2_jax.ops import ssd
from zamba2_jax.ops.decay import log_decays
from zamba2_jax.ops.ssd_pallas_gpu import Tuning, ssd_pallas_gpu

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
Pair = tuple[jax.stages.Compiled, jax.stages.Compiled]
Scan = Callable[..., tuple[jax.Array, jax.Array]]


class Times(NamedTuple):
    """Milliseconds of a call, forward and with the gradient: on the device, and on the clock."""

    forward: float
    with_gradient: float
    forward_clock: float
    with_gradient_clock: float


def kernels(x, dt, A, B, C, D, *, tuning: Tuning | None = None) -> tuple[jax.Array, jax.Array]:
    """`ssd_pallas_gpu` with the arguments of `ssd`."""
    return ssd_pallas_gpu(x, dt, log_decays(dt, A), B, C, D, None, tuning=tuning)


def check(model: str, dtype: str) -> dict[str, float]:
    """Relative error, by norms, of y, the state and every gradient, on a ragged length."""
    inputs = scan_inputs(2, 1000, scan_sizes(model), dtype).values()
    exact = [a.astype(jnp.float32) for a in inputs]
    expected = jax.jit(partial(with_gradient, partial(ssd, implementation="sequential")))(*exact)
    got = jax.jit(partial(with_gradient, kernels))(*inputs)
    return dict(zip(("y", "state", *(f"d{name}" for name in NAMES)), differences(got, expected), strict=True))


def compiled(function: Callable[..., Any], inputs: Any) -> Pair:
    """Of arrays or shapes by name: the function, and the function with its gradient."""
    forward, both = (jax.jit(f).lower(*inputs.values()).compile() for f in (function, partial(with_gradient, function)))
    return forward, both


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


def programs(model: str, rows: int, tokens: int, scans: dict[str, Scan]) -> dict[str, Pair]:
    """Scans compiled for a shape, by name."""
    shapes = jax.eval_shape(partial(scan_inputs, rows, tokens, scan_sizes(model), "bfloat16"))
    inputs = {name: shapes[name] for name in NAMES}  # eval_shape sorts them
    with ThreadPoolExecutor() as pool:
        return dict(zip(scans, pool.map(partial(compiled, inputs=inputs), scans.values()), strict=True))


def contenders(model: str, rows: int, tokens: int, scans: dict[str, Pair]) -> dict[str, tuple[Call, Call]]:
    """By name, all called once; without those that do not fit into memory."""
    inputs, found = scan_inputs(rows, tokens, scan_sizes(model), "bfloat16"), {}
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
    parser = option_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["zamba2-7b", "zamba2-1.2b", "zamba2-2.7b"])
    parser.add_argument(
        "--shapes", nargs="+", default=["1x2048", "2x2048", "1x4096", "4x4096", "8x2048", "1x16384", "8x16384"]
    )
    parser.add_argument("--no-xla", action="store_true", help="without plain XLA, which takes long to compile")
    parser.add_argument("--tunings", action="store_true", help="other sizes of the kernels too")
    options = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory beside JAX
    device = use_gpu()
    results: dict[str, Any] = {"jax": jax.__version__, "errors": {}, "milliseconds": []}
    devices = load_results(__file__) | {device.device_kind: results}
    wrong = False
    for model in options.models:
        for dtype, limit in LIMITS.items():
            errors = results["errors"][f"{model} {dtype}"] = check(model, dtype)
            wrong |= not all(error <= limit for error in errors.values())  # NaN is wrong too
            print(f"{model} {dtype:9}", " ".join(f"{name} {error:.1e}" for name, error in errors.items()), flush=True)
    save_results(__file__, devices)
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
            save_results(__file__, devices)
            print(f"{model} {rows} x {tokens}")
            for name, (forward, both, *clock) in times.items():
                ratios = (a / b for a, b in zip((forward, both), times["pallas"], strict=False))
                columns = *(f"{a:9.3f}" for a in (forward, both)), *(f"{a:7.2f}" for a in ratios)
                print(f"    {name:40}", *columns, *(f"{a:9.3f}" for a in clock), flush=True)


if __name__ == "__main__":
    main()
