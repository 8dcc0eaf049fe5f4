"""Are the GPU kernels of the scan right on a GPU, and how fast are they next to XLA's and mamba_ssm's?

On a machine with an NVIDIA GPU. First compares results and gradients with the recurrence in float32, at the shapes of
the released models; then times all of them, in turns, forward and with the gradient, and writes a JSON file beside
this one. Where `mamba_ssm` can be imported (with torch and triton) it is timed too.

    python experiments/ssd_gpu.py [--models zamba2-7b ...] [--tokens 2048 ...] [--rows 1 ...]
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory beside JAX

import jax
import jax.numpy as jnp
import numpy as np

from zamba2_jax import Zamba2Config
from zamba2_jax.ops import ssd
from zamba2_jax.ops.decay import log_decays
from zamba2_jax.ops.ssd_pallas_gpu import Tuning, ssd_pallas_gpu
from zamba2_jax.train.files import write_atomically

OUTPUT = Path(__file__).with_suffix(".json")
ROUNDS, CALLS = 11, 10
NAMES = ("x", "dt", "A", "B", "C", "D")
LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}

TUNINGS = {
    f"pallas chunk={chunk} warps={warps},{back} stages={stages}": Tuning(chunk, warps, back, stages)
    for chunk, warps, back, stages in [
        (64, 4, 8, 2),
        (64, 4, 4, 2),
        (64, 4, 4, 3),
        (64, 8, 8, 2),
        (128, 8, 8, 2),
        (128, 8, 16, 1),
    ]
}
Contender = tuple[Callable[[], Any], Callable[[], Any]]  # one call forward, and one with the gradient


def arguments(model: str, rows: int, tokens: int, dtype: str) -> dict[str, jax.Array]:
    """Inputs of the scan as in a model: dt of 0.001 to 0.1, A of -1 to -16."""
    config, rng = Zamba2Config.preset(model), np.random.default_rng(0)
    h, p, g, n = config.mamba_heads, config.mamba_head_dim, config.ngroups, config.d_state
    return {
        "x": jnp.asarray(rng.standard_normal((rows, tokens, h, p), np.float32), dtype),
        "dt": jnp.asarray(10 ** rng.uniform(-3, -1, (rows, tokens, h)), jnp.float32),
        "A": -jnp.asarray(rng.uniform(1, 16, h), jnp.float32),
        "B": jnp.asarray(rng.standard_normal((rows, tokens, g, n), np.float32), dtype),
        "C": jnp.asarray(rng.standard_normal((rows, tokens, g, n), np.float32), dtype),
        "D": jnp.ones(h, jnp.float32),
    }


def kernel(tuning: Tuning | None, x, dt, A, B, C, D) -> tuple[jax.Array, jax.Array]:
    """`ssd_pallas_gpu` with the arguments of `ssd`."""
    return ssd_pallas_gpu(x, dt, log_decays(dt, A), B, C, D, None, tuning=tuning)


def with_gradient(scan: Callable[..., Any], *inputs: jax.Array) -> Any:
    """Results and gradients, by all inputs, of y and the state weighed by themselves, at no further cost."""
    outputs, pull = jax.vjp(scan, *inputs)
    return outputs, pull(outputs)


def check(model: str, dtype: str) -> dict[str, float]:
    """Relative error, by norms, of y, the state and every gradient, on a ragged length."""
    inputs = arguments(model, 2, 1000, dtype).values()
    exact = [a.astype(jnp.float32) for a in inputs]
    expected = jax.jit(partial(with_gradient, partial(ssd, implementation="sequential")))(*exact)
    got = jax.jit(partial(with_gradient, partial(kernel, None)))(*inputs)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    errors = [float(np.linalg.norm(np.float64(a) - np.float64(e)) / np.linalg.norm(np.float64(e))) for a, e in pairs]
    return dict(zip(("y", "state", *(f"d{name}" for name in NAMES)), errors, strict=True))


def of_jax(scan: Callable[..., Any], inputs: dict[str, jax.Array]) -> Contender:
    """Both calls, compiled."""
    forward, both = (jax.jit(f).lower(*inputs.values()).compile() for f in (scan, partial(with_gradient, scan)))
    return partial(forward, *inputs.values()), partial(both, *inputs.values())


def of_mamba_ssm(inputs: dict[str, jax.Array]) -> Contender:
    """Both calls of mamba_ssm's kernel, at its own chunk size."""
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


def milliseconds(call: Callable[[], Any]) -> float:
    """Of one call among several in a row."""
    start = time.perf_counter()
    for _ in range(CALLS):
        results = call()
    wait(results)
    return (time.perf_counter() - start) / CALLS * 1e3


def medians(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds of every call, all of them timed in turns after one call each to warm up."""
    for call in calls.values():
        wait(call())
    rounds = [{name: milliseconds(call) for name, call in calls.items()} for _ in range(ROUNDS)]
    return {name: statistics.median(times[name] for times in rounds) for name in calls}


def contenders(model: str, rows: int, tokens: int) -> dict[str, Contender]:
    """By name, XLA first; without those that do not fit into memory."""
    inputs, found = arguments(model, rows, tokens, "bfloat16"), {}
    scans = {"xla": partial(ssd, implementation="xla")}
    scans |= {name: partial(kernel, tuning) for name, tuning in TUNINGS.items()}
    for name, scan in scans.items():
        try:
            found[name] = of_jax(scan, inputs)
            for call in found[name]:
                wait(call())
        except jax.errors.JaxRuntimeError as error:
            found.pop(name, None)
            print(f"    {name} left out: {str(error).splitlines()[0]}")
    if importlib.util.find_spec("mamba_ssm"):
        found["mamba_ssm"] = of_mamba_ssm(inputs)
    return found


def write(results: dict[str, Any]) -> None:
    """All or nothing."""
    write_atomically(OUTPUT, lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))


def main() -> None:
    """Prints the tables and writes the file; exits with 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["zamba2-1.2b", "zamba2-2.7b", "zamba2-7b"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 4096, 8192, 16384])
    options = parser.parse_args()
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        sys.exit("ssd_gpu.py needs an NVIDIA GPU: JAX sees none here")

    results: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__, "errors": {}, "milliseconds": []}
    wrong = False
    for model in options.models:
        for dtype, limit in LIMITS.items():
            errors = results["errors"][f"{model} {dtype}"] = check(model, dtype)
            wrong |= not all(error <= limit for error in errors.values())  # NaN is wrong too
            print(f"{model} {dtype:9}", " ".join(f"{name} {error:.1e}" for name, error in errors.items()), flush=True)
    write(results)
    if wrong:
        sys.exit(f"errors above {LIMITS}: nothing timed")

    for model in options.models:
        for rows, tokens in ((rows, tokens) for rows in options.rows for tokens in options.tokens):
            calls = contenders(model, rows, tokens)
            forward, both = (medians({name: pair[i] for name, pair in calls.items()}) for i in (0, 1))
            results["milliseconds"].append(
                {"model": model, "rows": rows, "tokens": tokens, "forward": forward, "with_gradient": both}
            )
            write(results)
            print(f"{model} {rows} x {tokens}: ms forward, with gradient; times the first pallas row's")
            first = next(iter(TUNINGS))
            for name in calls:
                ratios = [times[name] / times.get(first, float("nan")) for times in (forward, both)]
                print(f"    {name:44}{forward[name]:9.3f}{both[name]:9.3f}{ratios[0]:8.2f}{ratios[1]:8.2f}", flush=True)


if __name__ == "__main__":
    main()
