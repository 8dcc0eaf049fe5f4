"""How fast does a model of random weights write on a GPU, and how near is that to what its memory allows?

    python benchmarks/generation_gpu.py [--models zamba2-7b ...] [--rows 1 8 64]

In bfloat16, greedy, through `Engine`: milliseconds to the first token by the length of the prompt, and tokens per
second by the number of rows, after prompts of 32. A step reads every weight, a shared block at each of its calls, and
reads and writes the states of every row; those bytes over the time of a step are compared with the speed at which the
same GPU copies memory. Medians of 5 after one to warm up, which compiles. Prints a line per number and writes
generation_gpu.json beside this file, with a table per kind of device.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import RELEASED, load_results, median_seconds, option_parser, save_results, use_gpu, weight_bytes
from flax import nnx

from zamba2_jax import Engine, Request, Zamba2Config, cache_bytes, init_model, preset

PROMPTS = (128, 512, 4096)
SHORT, NEW_TOKENS = 32, 128

Generate = Callable[[int, int, int], Any]
"""Continues so many rows of prompts of so many tokens by so many more."""


def engine_of(model: Any, slots: int, capacity: int) -> Generate:
    """Of random tokens, through one engine of so many slots."""
    engine = Engine(model, slots=slots, capacity=capacity)

    def run(b: int, t: int, new: int) -> None:
        for row in np.random.default_rng(0).integers(3, model.config.vocab_size, (b, t)):
            engine.submit(Request(row, new))
        for _ in engine.events(streaming=False):
            pass

    return run


def measure(model: Any, rows: list[int], speed: float) -> dict[str, float]:
    """Every number of a model, by what it is, on a device that copies memory at `speed`."""
    found: dict[str, float] = {}

    def note(key: str, value: float) -> None:
        found[key] = value
        print(f"  {key}: {value:.2f}", flush=True)

    run = engine_of(model, 1, max(PROMPTS) + 1)
    for t in PROMPTS:
        note(f"prompt of {t}: ms to the first token", 1e3 * median_seconds(partial(run, 1, t, 1)))
    for b in rows:
        run = engine_of(model, b, 4 * NEW_TOKENS)
        begin, end = (median_seconds(partial(run, b, SHORT, new)) for new in (1, 1 + NEW_TOKENS))
        steps = NEW_TOKENS / (end - begin)
        note(f"rows {b}: tokens per second", b * steps)
        note(f"rows {b}: of what the memory allows", steps * step_bytes(model.config, b) / speed)
    return found


def bandwidth() -> float:
    """Bytes per second that a copy of 4 GiB reads and writes."""
    array = jnp.ones(2**30, jnp.float32)
    copy = jax.jit(lambda array: array + 1)
    return 2 * array.nbytes / median_seconds(partial(copy, array))


def step_bytes(config: Zamba2Config, b: int) -> int:
    """What a step of b rows moves: weights in bfloat16, read at each call, and the states, read and written."""
    return weight_bytes(config, "bfloat16")[1] + 2 * cache_bytes(config, b, 0, "bfloat16").total


def main() -> None:
    """Prints the numbers and writes them."""
    parser = option_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=RELEASED)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64])
    options = parser.parse_args()
    kind, speed = use_gpu().device_kind, bandwidth()
    print(f"{kind}: a copy moves {speed / 1e9:.0f} GB/s", flush=True)
    results = load_results(__file__)
    here = results.setdefault(kind, {})
    here["jax"], here["GB per second of a copy"] = jax.__version__, speed / 1e9
    for name in options.models:
        print(name, flush=True)
        model = init_model(preset(name), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        here[name] = measure(model, options.rows, speed)
        save_results(__file__, results)


if __name__ == "__main__":
    main()
