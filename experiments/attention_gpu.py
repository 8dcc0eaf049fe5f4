"""How fast is attention on an NVIDIA GPU: ours in plain XLA, cuDNN's, and cuDNN's with documents as a mask?

    python experiments/attention_gpu.py [--models zamba2-7b ...] [--tokens 4096 ...]

One row in bfloat16, at the heads of the released models, forward and with the gradient; documents are of a fifth of a
row. Milliseconds of a call among ten in a row, medians, and the largest difference of cuDNN's results from ours, by
norms. Prints a table.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zamba2_jax import Zamba2Config
from zamba2_jax.ops import causal_attention

ROUNDS, CALLS = 5, 10


def with_gradient(attend: Callable[..., jax.Array], *qkv: jax.Array) -> Any:
    """The result, and the gradients of it weighed by itself."""
    out, pull = jax.vjp(attend, *qkv)
    return out, pull(out)


def milliseconds(call: Callable[[], Any]) -> float:
    """Of one call."""
    jax.block_until_ready(call())
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            results = call()
        jax.block_until_ready(results)
        times.append((time.perf_counter() - start) / CALLS * 1e3)
    return statistics.median(times)


def difference(got: Any, expected: Any) -> float:
    """The largest of all arrays, by norms."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(float(np.linalg.norm(np.float64(a) - np.float64(e)) / np.linalg.norm(np.float64(e))) for a, e in pairs)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["zamba2-1.2b", "zamba2-2.7b", "zamba2-7b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 8192])
    options = parser.parse_args()
    if jax.default_backend() != "gpu":
        sys.exit("attention_gpu.py needs an NVIDIA GPU: JAX sees none here")
    print(f"{jax.devices()[0].device_kind}: ms forward, ms with the gradient, difference from plain XLA")
    for model in options.models:
        config = Zamba2Config.preset(model)
        for tokens in options.tokens:
            shape = 1, tokens, config.attention_heads, config.attention_head_dim
            qkv = [jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3)]
            ids = jnp.broadcast_to(1 + jnp.arange(tokens) // (tokens // 5), shape[:2])
            for documents in (None, ids):
                expected = None
                for name in ("xla", "cudnn"):
                    attend = partial(causal_attention, scale=shape[-1] ** -0.5, implementation=name)
                    attend = partial(attend, segment_ids=documents)
                    forward, both = (
                        partial(jax.jit(f).lower(*qkv).compile(), *qkv)
                        for f in (attend, partial(with_gradient, attend))
                    )
                    expected = both() if expected is None else expected
                    times = f"{milliseconds(forward):8.2f}{milliseconds(both):8.2f}"
                    label = f"{name}{'' if documents is None else ', documents'}"
                    print(f"{model} {tokens:6} {label:18}{times} {difference(both(), expected):.1e}", flush=True)


if __name__ == "__main__":
    main()
