"""How fast is the selective scan of Mamba1 on this machine's CPU, beside transformers, and what memory does it take?

    python benchmarks/selective_scan.py                      # everything, some minutes
    python benchmarks/selective_scan.py speed memory chunks  # any of these

Needs the `parity` extra, for transformers' own function, `mamba_selective_scan` of its Zamba, which is called for each
head as its mixer does; torch runs at the number of threads at which it is fastest. Every ratio is one of medians of
calls that took turns, so that a busy machine slows both sides. Prints tables and writes selective_scan.json beside this
file.
"""

import sys
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from common import (
    Call,
    array_bytes,
    differences,
    load_results,
    machine,
    medians,
    save_results,
    use_cpu,
    with_gradient,
)
from transformers.models.zamba.modeling_zamba import mamba_selective_scan

from zamba2_jax.ops import selective_scan

THREADS, ROUNDS = (1, 2), 3


class Sizes(NamedTuple):
    """Tokens, heads, channels of a head and state of a scan of one row."""

    t: int
    h: int
    p: int
    n: int


SMALL, SEVEN_B = Sizes(t=1024, h=2, p=256, n=16), Sizes(t=1024, h=2, p=3712, n=16)
NAMES = {SMALL: "t=1024 h=2 p=256 n=16", SEVEN_B: "t=1024 h=2 p=3712 n=16 (7B)"}
Inputs = dict[str, jax.Array]
Row = dict[str, Any]


def scan_inputs(sizes: Sizes) -> Inputs:
    """Random arguments; dt log-uniform from 0.001 to 0.1 and A from -1 to -n, as initialised."""
    (t, h, p, n), keys = sizes, iter(jax.random.split(jax.random.key(0), 5))
    return {
        "x": jax.random.normal(next(keys), (1, t, h, p)),
        "dt": 10 ** jax.random.uniform(next(keys), (1, t, h, p), minval=-3.0, maxval=-1.0),
        "A": -jax.numpy.broadcast_to(jax.numpy.arange(1.0, n + 1), (h, p, n)),
        "B": jax.random.normal(next(keys), (1, t, h, n)),
        "C": jax.random.normal(next(keys), (1, t, h, n)),
        "D": jax.random.normal(next(keys), (h, p)),
    }


def output(*arrays: jax.Array, **options: Any) -> jax.Array:
    """y of ours."""
    return selective_scan(*arrays, **options)[0]


def of_jax(inputs: Inputs, **options: Any) -> tuple[Call, Call]:
    """Calls for y, and for y and all gradients."""
    scan, arrays = partial(output, **options), list(inputs.values())
    return partial(jax.jit(scan), *arrays), partial(jax.jit(partial(with_gradient, scan)), *arrays)


def of_torch(inputs: Inputs) -> tuple[Call, Call]:
    """The same of transformers, head by head."""
    tensors = [torch.from_numpy(np.array(array)) for array in inputs.values()]

    def scan(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any) -> torch.Tensor:
        x, dt, B, C = (array.movedim(1, -1) for array in (x, dt, B, C))  # [b, h, ..., t]
        heads = [
            mamba_selective_scan(x[:, i], dt[:, i], A[i], B[:, i], C[:, i], D=D[i], return_last_state=True)[0]
            for i in range(len(A))
        ]
        return torch.stack(heads, 1).movedim(-1, 1)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return scan(*tensors)

    def both() -> Any:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        y = scan(*leaves)
        return y, torch.autograd.grad(y, leaves, y.detach())

    return forward, both


def best_threads(call: Call) -> int:
    """At which torch is fastest; these stay set."""
    times = {}
    for threads in THREADS:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        call()
        times[threads] = time.perf_counter() - start
    best = min(times, key=lambda threads: times[threads])
    torch.set_num_threads(best)
    return best


def speed() -> list[Row]:
    """Ours beside transformers, which keeps every state, and in its gradient a row of zeros for each."""
    rows, inputs = [], scan_inputs(SMALL)
    ours, theirs = of_jax(inputs), of_torch(inputs)
    error = differences(ours[0](), theirs[0]().numpy())[0]
    for i, what in enumerate(("forward", "forward and backward")):
        threads = best_threads(theirs[i])
        times = medians({"ours": ours[i], "theirs": theirs[i]}, ROUNDS)
        row = {"shape": NAMES[SMALL], "pass": what, "threads of theirs": threads}
        row |= {f"{side}, ms": 1e3 * seconds for side, seconds in times.items()}
        rows.append(row | {"ours / theirs": times["ours"] / times["theirs"], "y differs by": error})
    return rows


def memory() -> list[Row]:
    """What the gradient takes beside arguments and results, by the compiler."""
    rows = []
    for sizes, name in NAMES.items():
        inputs = jax.eval_shape(partial(scan_inputs, sizes))
        ordered = [inputs[key] for key in ("x", "dt", "A", "B", "C", "D")]  # eval_shape sorts them
        found = jax.jit(partial(with_gradient, output)).lower(*ordered).compile().memory_analysis()
        size = array_bytes(inputs)
        extra = found.temp_size_in_bytes
        rows.append({"shape": name, "inputs, MB": size / 1e6, "extra, MB": extra / 1e6, "extra / inputs": extra / size})
    return rows


def chunks() -> list[Row]:
    """Sizes of chunks and windows, in turns."""
    rows = []
    for sizes, name in NAMES.items():
        inputs = scan_inputs(sizes._replace(t=256) if sizes is SEVEN_B else sizes)
        options = {
            f"{c} x {w}": {"chunk_size": c, "window": w} for c, w in ((8, 1), (16, 1), (32, 1), (64, 1), (16, 4))
        }
        calls = {key: of_jax(inputs, **given) for key, given in options.items()}
        for i, what in enumerate(("forward", "forward and backward")):
            times = medians({key: pair[i] for key, pair in calls.items()}, ROUNDS)
            rows.append({"shape": name, "pass": what} | {f"{key}, ms": 1e3 * value for key, value in times.items()})
    return rows


def show(title: str, rows: list[Row]) -> None:
    """As a table."""
    print(f"\n{title}")
    for row in rows:
        print(
            "  ".join(f"{key}: {value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items())
        )


def main() -> None:
    """Runs the parts that were named, or all."""
    parts = {"speed": speed, "memory": memory, "chunks": chunks}
    unknown = set(sys.argv[1:]) - set(parts)
    if unknown:
        sys.exit(f"{', '.join(sorted(unknown))}: expected any of {', '.join(parts)}")
    use_cpu()
    results = load_results(__file__)
    results["measured on"] = machine("torch", "transformers")
    for name in sys.argv[1:] or parts:
        results[name] = parts[name]()
        show(name, results[name])
    save_results(__file__, results)


if __name__ == "__main__":
    main()
