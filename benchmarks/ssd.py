"""How fast and how exact is the scan on this machine's CPU, beside the others there are?

    python benchmarks/ssd.py                  # everything, some twenty minutes
    python benchmarks/ssd.py speed error      # any of: speed, error, length, memory, traffic

Needs the `parity` extra, for transformers' own function. `mamba2-jax` and `bonsai` are compared where they can be
imported. Every ratio is one of medians of calls that took turns, two by two, so that a busy machine slows both sides.
Prints tables and writes ssd.json beside this file. `traffic` is what the kernels move on TPUs that are not there,
the worst of each model in the table of ssd_tpu_traffic.py; it is left out without the `tpu` extra. On a GPU the kernels
are timed by ssd_gpu.py.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import ssd_tpu_traffic
import torch
from common import (
    Call,
    ScanSizes,
    array_bytes,
    differences,
    gradient,
    load_results,
    machine,
    medians,
    save_results,
    scan_inputs,
    use_absent_tpus,
    use_cpu,
    with_gradient,
)
from transformers.models.zamba2.modeling_zamba2 import mamba2_chunk_scan

from zamba2_jax.ops import ssd, ssd_sequential

SMALL, LARGE = ScanSizes(h=64, p=64, n=64, g=1), ScanSizes(h=112, p=64, n=64, g=2)
SHAPES = {
    "t=1024 h=64 p=64 n=64 g=1": (1024, SMALL),
    "t=4096 h=112 p=64 n=64 g=2 (7B)": (4096, LARGE),
}
TORCH_CHUNKS = (32, 64, 128)
OTHERS = {"mamba2-jax": "mamba2_jax.modeling", "bonsai": "bonsai.models.mamba2.modeling"}
OTHER_CHUNKS = (64,)

Inputs = dict[str, Any]
Row = dict[str, Any]


def of_jax(scan: Callable[..., jax.Array], inputs: Inputs) -> tuple[Call, Call]:
    """Calls for y, and for y and all gradients."""
    forward, arrays = jax.jit(scan), list(inputs.values())
    both = jax.jit(partial(with_gradient, scan))
    return partial(forward, *arrays), partial(both, *arrays)


def of_torch(chunk: int, inputs: Inputs) -> tuple[Call, Call]:
    """The same of transformers."""
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in inputs.items()}

    def scan(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any) -> torch.Tensor:
        return mamba2_chunk_scan(x, dt, A, B, C, chunk, D=D, return_final_states=True)[0]

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return scan(**tensors)

    def both() -> Any:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        y = scan(**leaves)
        return y, torch.autograd.grad(y, tuple(leaves.values()), y.detach())

    return forward, both


def of_other(module: str, chunk: int) -> Callable[..., jax.Array]:
    """The scan of another JAX package, which wants B and C per head and dt before softplus."""
    scan = importlib.import_module(module).ssd_forward

    def run(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any) -> jax.Array:
        B, C = (jnp.repeat(array, x.shape[2] // array.shape[2], axis=2) for array in (B, C))
        before_softplus = dt + jnp.log(-jnp.expm1(-dt))
        return scan(x, before_softplus, A, B, C, chunk, D, jnp.zeros_like(A), 0.0, jnp.inf)[0]

    return run


def speed() -> list[Row]:
    """Ours beside each of the others at its best chunk size, in pairs."""
    rows = []
    for name, (t, sizes) in SHAPES.items():
        inputs = scan_inputs(1, t, sizes)
        ours = of_jax(output, inputs)
        others = {"transformers": {chunk: of_torch(chunk, inputs) for chunk in TORCH_CHUNKS}}
        for package, module in OTHERS.items():
            if importlib.util.find_spec(module.split(".")[0]):
                others[package] = {chunk: of_jax(of_other(module, chunk), inputs) for chunk in OTHER_CHUNKS}
        for i, what in enumerate(("forward", "forward and backward")):
            for package, calls in others.items():
                first = medians({str(chunk): pair[i] for chunk, pair in calls.items()}, rounds=3)
                best = min(calls, key=lambda chunk, first=first: first[str(chunk)])
                times = medians({"ours": ours[i], "theirs": calls[best][i]}, rounds=9)
                row = {"shape": name, "pass": what, "beside": package, "at chunk": best}
                row |= {f"{side}, ms": 1e3 * time for side, time in times.items()}
                row["ours / theirs"] = times["ours"] / times["theirs"]
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
    return rows


def error() -> list[Row]:
    """|y - exact| / |exact| beside transformers in float32, and beside mamba_ssm's arithmetic in bfloat16."""
    rows = []
    for name, (_, sizes) in SHAPES.items():
        # Of longer rows the oracle's terms do not fit.
        inputs = {key: np.asarray(array) for key, array in scan_inputs(1, 1024, sizes).items()}
        low = {key: rounded(array) if key in "xBC" else array for key, array in inputs.items()}
        found = {"float32": {"ours": scanned(inputs), "transformers": of_torch(64, inputs)[0]().numpy()}}
        found["bfloat16"] = {"ours": scanned(low, jnp.bfloat16), "mamba_ssm, simulated": as_mamba_ssm(**low)}
        for (dtype, results), exact_inputs in zip(found.items(), (inputs, low), strict=True):
            with jax.enable_x64(True):
                wide = {key: jnp.asarray(array, jnp.float64) for key, array in exact_inputs.items()}
                exact = np.asarray(jax.jit(lambda wide: ssd_sequential(**wide)[0])(wide))
            for of, y in results.items():
                rows.append({"sizes of": name, "dtype": dtype, "of": of, "error": differences(y, exact)[0]})
    return rows


def output(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any) -> jax.Array:
    """y of ours."""
    return ssd(x, dt, A, B, C, D)[0]


def scanned(inputs: Inputs, dtype: Any = jnp.float32) -> np.ndarray:
    """y of ours, with x, B and C in `dtype`."""
    arrays = {name: jnp.asarray(array, dtype if name in "xBC" else None) for name, array in inputs.items()}
    return np.asarray(jax.jit(output)(**arrays), np.float32)


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
    calls = {t: of_jax(output, scan_inputs(1, t, SMALL)) for t in lengths}
    rows: list[Row] = [{"tokens": t} for t in lengths]
    for i, what in enumerate(("forward", "forward and backward")):
        times = medians({str(t): pair[i] for t, pair in calls.items()}, rounds=9)
        for row in rows:
            row[f"{what}, us per token"] = 1e6 * times[str(row["tokens"])] / row["tokens"]
    return rows


def memory() -> list[Row]:
    """What the gradient of one row of 16,384 tokens takes beside its arguments and results, by the compiler."""
    inputs = jax.eval_shape(lambda: scan_inputs(1, 16384, SMALL))
    arguments = [inputs[name] for name in ("x", "dt", "A", "B", "C", "D")]  # eval_shape sorts them
    found = jax.jit(gradient(output)).lower(arguments, inputs["x"]).compile().memory_analysis()
    size = array_bytes(inputs)
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
    use_cpu()
    use_absent_tpus()
    results = load_results(__file__)
    results["measured on"] = machine("torch", "transformers")
    for name in sys.argv[1:] or parts:
        results[name] = parts[name]()
        show(name, results[name])
    save_results(__file__, results)


if __name__ == "__main__":
    main()
