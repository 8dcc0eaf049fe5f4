"""How long do a full pass and a gradient of a whole model take on this machine?

    python experiments/bench_model.py

Two models: the layers of zamba2-1.2b, 6 of them with one call of the shared block, at one row of 1024 tokens; and
zamba2-nano, which the demo trains, at 8 rows of 256. Medians of 5 calls, float32, random weights. To compare two
versions of the package, run it with each on PYTHONPATH, in turns.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from flax import nnx

from zamba2_jax import Zamba2, Zamba2Config, next_token_loss

MODELS = {
    "6 layers of zamba2-1.2b, 1 x 1024": (
        dataclasses.replace(Zamba2Config.preset("zamba2-1.2b"), num_layers=6, hybrid_layer_ids=(5,)),
        (1, 1024),
    ),
    "zamba2-nano, 8 x 256": (Zamba2Config.preset("zamba2-nano"), (8, 256)),
}


def seconds(call: Callable[[], Any]) -> float:
    """Median of 5 calls after one to compile."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    """Prints a line per model."""
    forward = jax.jit(lambda model, tokens: model(tokens))
    gradient = jax.jit(jax.value_and_grad(lambda model, tokens: next_token_loss(model, tokens)[0]))
    for name, (config, shape) in MODELS.items():
        model = Zamba2(config, rngs=nnx.Rngs(0))
        tokens = jax.random.randint(jax.random.key(0), shape, 0, config.vocab_size)
        passes = seconds(lambda: forward(model, tokens)), seconds(lambda: gradient(model, tokens))  # noqa: B023
        print(f"{name}: forward {1e3 * passes[0]:.0f} ms, loss and gradient {1e3 * passes[1]:.0f} ms", flush=True)


if __name__ == "__main__":
    main()
