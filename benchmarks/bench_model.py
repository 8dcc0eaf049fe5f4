"""How long do a full pass and a gradient of a whole model take on this machine?

    python benchmarks/bench_model.py [--models zamba2-7b ...]

Medians of 5 calls, random weights. On a CPU, in float32: zamba2-nano, which the demo trains, at 8 rows of 256 tokens,
and of each model named 6 layers with one call of a shared block, at one row of 1024. To compare two versions of the
package, run it with each on PYTHONPATH, in turns. On a GPU, in bfloat16: the same 6 layers at 4 rows of 4096 tokens,
packed documents of 1000 or one document each, with the kernels that are the default there and in plain XLA.
"""

import argparse
import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from unittest import mock

from zamba2_jax import preset

if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from flax import nnx

from zamba2_jax import Zamba2, Zamba2Config, next_token_loss


def layers(name: str) -> Zamba2Config:
    """The model of a preset, cut to 6 layers and one call of a shared block."""
    return dataclasses.replace(preset(name), num_layers=6, hybrid_layer_ids=(5,), num_shared_blocks=1)


def seconds(call: Callable[[], Any]) -> float:
    """Median of 5 calls after one to warm up."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@contextlib.contextmanager
def plain_xla() -> Iterator[None]:
    """What is traced inside takes no kernels."""
    modules = ("zamba2_jax.ops.ssd", "zamba2_jax.ops.attention")
    scan, attention = (mock.patch(f"{module}.kernels", return_value=None) for module in modules)
    with scan, attention:
        yield


def measure(config: Zamba2Config, shape: tuple[int, int], dtype: str, cases: dict[str, tuple[int | None, Any]]) -> None:
    """Prints a line for each case: tokens per document, or None for a row, and a context to trace in."""
    model = Zamba2(config, rngs=nnx.Rngs(0), dtype=dtype)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, config.vocab_size)
    programs = {}
    for name, (document, context) in cases.items():
        ids = None if document is None else jnp.broadcast_to(1 + jnp.arange(shape[1]) // document, shape)
        passes = (  # new functions for each case: JAX would give the trace of known ones, made in another context
            lambda model, tokens, ids: model(tokens, ids),
            jax.value_and_grad(lambda model, tokens, ids: next_token_loss(model, tokens, ids)[0]),
        )
        with context:
            programs[name] = ids, [jax.jit(function).lower(model, tokens, ids) for function in passes]
    with ThreadPoolExecutor() as pool:
        compiling = {name: [pool.submit(p.compile) for p in lowered] for name, (_, lowered) in programs.items()}
    for name, (ids, _) in programs.items():
        forward, gradient = (seconds(partial(p.result(), model, tokens, ids)) for p in compiling[name])
        print(f"{name}: forward {1e3 * forward:.1f} ms, loss and gradient {1e3 * gradient:.1f} ms", flush=True)


def main() -> None:
    """Prints a line per model, or several."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+")
    models = parser.parse_args().models
    if jax.default_backend() == "cpu":
        nothing = contextlib.nullcontext()
        for name in models or ["zamba2-1.2b"]:
            measure(layers(name), (1, 1024), "float32", {f"6 layers of {name}, 1 x 1024": (None, nothing)})
        nano = preset("zamba2-nano")
        measure(nano, (8, 256), "float32", {"zamba2-nano, 8 x 256": (None, nothing)})
        return
    sides = {"kernels": contextlib.nullcontext, "plain XLA": plain_xla}
    documents = {"documents of 1000": 1000, "one document": None}
    for name in models or ["zamba2-7b", "zamba2-1.2b"]:
        names = f"6 layers of {name}, 4 x 4096, {{}}, {{}}"
        cases = {names.format(d, s): (documents[d], sides[s]()) for d in documents for s in sides}
        measure(layers(name), (4, 4096), "bfloat16", cases)


if __name__ == "__main__":
    main()
