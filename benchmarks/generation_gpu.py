"""How fast does a model of random weights write on a GPU, and how near is that to what its memory allows?

    python benchmarks/generation_gpu.py [--models zamba2-7b ...] [--rows 1 8 64]

In bfloat16, greedy, through `Engine`: milliseconds to the first token by the length of the prompt, and tokens per
second by the number of rows, after prompts of 32. A step reads every weight, a shared block at each of its calls, and
reads and writes the states of every row; those bytes over the time of a step are compared with the speed at which the
same GPU copies memory. Medians of 5 after one to warm up, which compiles. Prints a line per number and writes
generation_gpu.json beside this file, with a table per kind of device.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_model import seconds
from flax import nnx

from zamba2_jax import Zamba2, Zamba2Config, cache_bytes, preset
from zamba2_jax.files import write_json
from zamba2_jax.inference import Engine, Request

RESULTS = Path(__file__).with_suffix(".json")
PROMPTS = (128, 512, 4096)
SHORT, NEW_TOKENS = 32, 128

Generate = Callable[[int, int, int], Any]
"""Continues so many rows of prompts of so many tokens by so many more."""


def engine_of(model: Zamba2, slots: int, capacity: int) -> Generate:
    """Of random tokens, through one engine of so many slots."""
    engine = Engine(model, slots=slots, capacity=capacity)

    def run(b: int, t: int, new: int) -> None:
        for row in np.random.default_rng(0).integers(3, model.config.vocab_size, (b, t)):
            engine.submit(Request(row, new))
        for _ in engine.events(streaming=False):
            pass

    return run


def measure(model: Zamba2, rows: list[int], speed: float) -> dict[str, float]:
    """Every number of a model, by what it is, on a device that copies memory at `speed`."""
    found: dict[str, float] = {}

    def note(key: str, value: float) -> None:
        found[key] = value
        print(f"  {key}: {value:.2f}", flush=True)

    run = engine_of(model, 1, max(PROMPTS) + 1)
    for t in PROMPTS:
        note(f"prompt of {t}: ms to the first token", 1e3 * seconds(partial(run, 1, t, 1)))
    for b in rows:
        run = engine_of(model, b, 4 * NEW_TOKENS)
        begin, end = (seconds(partial(run, b, SHORT, new)) for new in (1, 1 + NEW_TOKENS))
        steps = NEW_TOKENS / (end - begin)
        note(f"rows {b}: tokens per second", b * steps)
        note(f"rows {b}: of what the memory allows", steps * step_bytes(model.config, b) / speed)
    return found


def bandwidth() -> float:
    """Bytes per second that a copy of 4 GiB reads and writes."""
    array = jnp.ones(2**30, jnp.float32)
    copy = jax.jit(lambda array: array + 1)
    return 2 * array.nbytes / seconds(partial(copy, array))


def weight_bytes(config: Zamba2Config, dtype: str) -> tuple[int, int]:
    """Bytes of the weights a token needs, and of those it reads if nothing stays in a cache."""
    model = jax.eval_shape(lambda: Zamba2(config, rngs=nnx.Rngs(0), dtype=dtype))

    def size(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    once = [
        (block.attention.q_embedded, block.attention.k_embedded, block.attention.v_embedded) for block in model.shared
    ]
    each_call = [size(block) - size(of_block) for block, of_block in zip(model.shared, once, strict=True)]
    calls = sum(each_call[row.hybrid.block] for row in config.layer_plan if row.hybrid is not None)
    return size(model), size(model) - sum(each_call) + calls


def step_bytes(config: Zamba2Config, b: int) -> int:
    """What a step of b rows moves: weights in bfloat16, read at each call, and the states, read and written."""
    return weight_bytes(config, "bfloat16")[1] + 2 * cache_bytes(config, b, 0, "bfloat16").total


def main() -> None:
    """Prints the numbers and writes them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["zamba2-1.2b", "zamba2-2.7b", "zamba2-7b"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64])
    options = parser.parse_args()
    kind, speed = jax.devices()[0].device_kind, bandwidth()
    print(f"{kind}: a copy moves {speed / 1e9:.0f} GB/s", flush=True)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    here = results.setdefault(kind, {})
    here["GB per second of a copy"] = speed / 1e9
    for name in options.models:
        print(name, flush=True)
        model = Zamba2(preset(name), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        here[name] = measure(model, options.rows, speed)
        write_json(RESULTS, results)


if __name__ == "__main__":
    main()
