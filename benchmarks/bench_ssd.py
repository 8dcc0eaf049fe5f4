"""How fast and how exact is the scan on this machine's CPU, beside the others there are?

    python benchmarks/bench_ssd.py                  # everything, some twenty minutes
    python benchmarks/bench_ssd.py speed error      # any of: speed, error, length, memory, traffic

Needs the `parity` extra, for transformers' own function. `mamba2-jax` and `bonsai` are compared where they can be
imported. Every ratio is one of medians of calls that took turns, two by two, so that a busy machine slows both sides.
Prints tables and writes bench_ssd.json beside this file. `traffic` is what the kernels move on TPUs that are not there,
the worst of each model in the table of ssd_tpu_traffic.py; it is left out without the `tpu` extra. On a GPU the kernels
are timed by ssd_gpu.py.
"""

import importlib
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import ssd_tpu_traffic
import torch
from transformers.models.zamba2.modeling_zamba2 import mamba2_chunk_scan

from zamba2_jax.files import write_json
from zamba2_jax.ops import ssd, ssd_sequential

RESULTS = Path(__file__).with_suffix(".json")
SHAPES = {
    "t=1024 h=64 p=64 n=64 g=1": (1, 1024, 64, 64, 64, 1),
    "t=4096 h=112 p=64 n=64 g=2 (7B)": (1, 4096, 112, 64, 64, 2),
}
TORCH_CHUNKS = (32, 64, 128)
OTHERS = {"mamba2-jax": "mamba2_jax.modeling", "bonsai": "bonsai.models.mamba2.modeling"}
OTHER_CHUNKS = (64,)

Inputs = dict[str, Any]
Call = Callable[[], Any]
Row = dict[str, Any]


def arguments(b: int, t: int, h: int, p: int, n: int, g: int) -> Inputs:
    """Random arguments of `ssd`, float32; dt log-uniform from 0.001 to 0.1 and A from -1 to -16, as initialised."""
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.standard_normal((b, t, h, p)),
        "dt": 10 ** rng.uniform(-3, -1, (b, t, h)),
        "A": -rng.uniform(1, 16, h),
        "B": rng.standard_normal((b, t, g, n)),
        "C": rng.standard_normal((b, t, g, n)),
        "D": rng.standard_normal(h),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def of_jax(scan: Callable[..., jax.Array], inputs: Inputs) -> tuple[Call, Call]:
    """Calls for y, and for y and all gradients."""
    arrays = {name: jnp.asarray(array) for name, array in inputs.items()}

    @jax.jit
    def both(arrays: Inputs) -> Any:
        y, pull = jax.vjp(lambda arrays: scan(**arrays), arrays)
        return y, pull(arrays["x"])

    forward = jax.jit(lambda arrays: scan(**arrays))
    return lambda: jax.block_until_ready(forward(arrays)), lambda: jax.block_until_ready(both(arrays))


def of_torch(chunk: int, inputs: Inputs) -> tuple[Call, Call]:
    """The same of transformers."""
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}

    def scan(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any) -> torch.Tensor:
        return mamba2_chunk_scan(x, dt, A, B, C, chunk, D=D, return_final_states=True)[0]

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return scan(**tensors)

    def both() -> Any:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        y = scan(**leaves)
        return y, torch.autograd.grad(y, tuple(leaves.values()), tensors["x"])

    return forward, both


def of_other(module: str, chunk: int) -> Callable[..., jax.Array]:
    """The scan of another JAX package, which wants B and C per head and dt before softplus."""
    scan = importlib.import_module(module).ssd_forward

    def run(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any) -> jax.Array:
        B, C = (jnp.repeat(array, x.shape[2] // array.shape[2], axis=2) for array in (B, C))
        before_softplus = dt + jnp.log(-jnp.expm1(-dt))
        return scan(x, before_softplus, A, B, C, chunk, D, jnp.zeros_like(A), 0.0, jnp.inf)[0]

    return run


def milliseconds(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Medians of the calls, which take turns after one each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def speed() -> list[Row]:
    """Ours beside each of the others at its best chunk size, in pairs."""
    rows = []
    for name, shape in SHAPES.items():
        inputs = arguments(*shape)
        ours = of_jax(lambda **arrays: ssd(**arrays)[0], inputs)
        others = {"transformers": {chunk: of_torch(chunk, inputs) for chunk in TORCH_CHUNKS}}
        for package, module in OTHERS.items():
            if importlib.util.find_spec(module.split(".")[0]):
                others[package] = {chunk: of_jax(of_other(module, chunk), inputs) for chunk in OTHER_CHUNKS}
        for i, what in enumerate(("forward", "forward and backward")):
            for package, calls in others.items():
                first = milliseconds({str(chunk): pair[i] for chunk, pair in calls.items()}, rounds=3)
                best = min(calls, key=lambda chunk, first=first: first[str(chunk)])
                times = milliseconds({"ours": ours[i], "theirs": calls[best][i]}, rounds=9)
                row = {"shape": name, "pass": what, "beside": package, "at chunk": best, "ours, ms": times["ours"]}
                row |= {"theirs, ms": times["theirs"], "ours / theirs": times["ours"] / times["theirs"]}
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
    return rows


def error() -> list[Row]:
    """|y - exact| / |exact| beside transformers in float32, and beside mamba_ssm's arithmetic in bfloat16."""
    rows = []
    for name, (b, _, *sizes) in SHAPES.items():
        inputs = arguments(b, 1024, *sizes)  # of longer rows the oracle's terms do not fit
        low = {key: rounded(array) if key in "xBC" else array for key, array in inputs.items()}
        found = {"float32": {"ours": scanned(inputs), "transformers": of_torch(64, inputs)[0]().numpy()}}
        found["bfloat16"] = {"ours": scanned(low, jnp.bfloat16), "mamba_ssm, simulated": as_mamba_ssm(**low)}
        for (dtype, results), exact_inputs in zip(found.items(), (inputs, low), strict=True):
            with jax.enable_x64(True):
                wide = {key: jnp.asarray(array, jnp.float64) for key, array in exact_inputs.items()}
                exact = np.asarray(jax.jit(lambda wide: ssd_sequential(**wide)[0])(wide))
            for of, y in results.items():
                relative = float(np.linalg.norm(np.float64(y) - exact) / np.linalg.norm(exact))
                rows.append({"sizes of": name, "dtype": dtype, "of": of, "error": relative})
    return rows


def scanned(inputs: Inputs, dtype: Any = jnp.float32) -> np.ndarray:
    """y of ours, with x, B and C in `dtype`."""
    arrays = {name: jnp.asarray(array, dtype if name in "xBC" else None) for name, array in inputs.items()}
    return np.asarray(jax.jit(lambda arrays: ssd(**arrays)[0])(arrays), np.float32)


def rounded(array: Any) -> np.ndarray:
    """To bfloat16, held in float32."""
    return np.asarray(jnp.asarray(array, jnp.bfloat16), np.float32)


def as_mamba_ssm(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, size: int = 256) -> np.ndarray:
    """Every product of a chunk with operands in bfloat16 and sums in float32, as mamba_ssm's kernels do it."""
    (_, t, h, _), r = x.shape, x.shape[2] // B.shape[2]
    y, state = np.empty_like(x), np.zeros((h, x.shape[3], B.shape[3]), np.float32)
    causal = np.tril(np.ones((size, size), bool))
    for start in range(0, t, size):
        now = slice(start, start + size)
        for head in range(h):
            xs, Bs, Cs, dts = x[0, now, head], B[0, now, head // r], C[0, now, head // r], dt[0, now, head]
            sums = np.cumsum(dts * A[head], dtype=np.float32)
            decay = np.exp(np.where(causal, sums[:, None] - sums, -np.inf))
            weights = rounded(Cs @ Bs.T * decay * dts)
            before = Cs @ rounded(state[head]).T * np.exp(sums)[:, None]
            y[0, now, head] = weights @ xs + before + D[head] * xs
            added = xs.T @ rounded(Bs * (np.exp(sums[-1] - sums) * dts)[:, None])
            state[head] = np.exp(sums[-1]) * state[head] + added
    return rounded(y)


def length() -> list[Row]:
    """Cost per token as rows grow; the lengths take turns."""
    lengths = (2048, 4096, 8192, 16384)
    calls = {t: of_jax(lambda **arrays: ssd(**arrays)[0], arguments(1, t, 64, 64, 64, 1)) for t in lengths}
    rows: list[Row] = [{"tokens": t} for t in lengths]
    for i, what in enumerate(("forward", "forward and backward")):
        times = milliseconds({str(t): pair[i] for t, pair in calls.items()}, rounds=9)
        for row in rows:
            row[f"{what}, us per token"] = 1e3 * times[str(row["tokens"])] / row["tokens"]
    return rows


def memory() -> list[Row]:
    """What the gradient of one row of 16,384 tokens takes beside its arguments and results, by the compiler."""

    def gradient(inputs: Inputs) -> Inputs:
        _, pull = jax.vjp(lambda inputs: ssd(**inputs)[0], inputs)
        return pull(inputs["x"])[0]

    inputs = arguments(1, 16384, 64, 64, 64, 1)
    found = jax.jit(gradient).lower(inputs).compile().memory_analysis()
    size = sum(array.nbytes for array in inputs.values())
    return [
        {
            "inputs, MB": size / 1e6,
            "extra, MB": found.temp_size_in_bytes / 1e6,
            "extra / inputs": found.temp_size_in_bytes / size,
        }
    ]


def traffic() -> list[Row]:
    """The most bytes that the TPU kernels move, over the fewest possible, of all chips, lengths and starts."""
    worst: dict[tuple[str, str, str], float] = {}
    for row in ssd_tpu_traffic.table():
        key = row["model"], row["dtype"], row["direction"]
        worst[key] = max(worst.get(key, 0.0), row["pallas"]["ratio"])
    return [dict(zip(("model", "dtype", "pass"), key, strict=True)) | {"of the fewest": worst[key]} for key in worst]


def show(title: str, rows: list[Row]) -> None:
    """As a table."""
    cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(list(rows[0]), *cells, strict=True)]
    print(f"\n{title}")
    for line in ([*rows[0]], *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


def main() -> None:
    """Runs the parts that were named, or all."""
    parts = {"speed": speed, "error": error, "length": length, "memory": memory}
    if importlib.util.find_spec("libtpu"):
        parts["traffic"] = traffic
    unknown = set(sys.argv[1:]) - set(parts)
    if unknown:
        sys.exit(f"{', '.join(sorted(unknown))}: expected any of {', '.join(parts)}")
    versions = {"jax": jax.__version__, "torch": torch.__version__, "python": platform.python_version()}
    results: dict[str, Any] = {"cores": os.cpu_count(), **versions}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text()) | results
    for name in sys.argv[1:] or parts:
        results[name] = parts[name]()
        show(name, results[name])
    write_json(RESULTS, results)


if __name__ == "__main__":
    main()
