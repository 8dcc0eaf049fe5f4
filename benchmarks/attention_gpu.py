"""How fast is attention on an NVIDIA GPU: ours in plain XLA, cuDNN's, and cuDNN's with documents as a mask?

    python benchmarks/attention_gpu.py [--models zamba2-7b ...] [--tokens 4096 ...]

One row in bfloat16, at the heads of the released models, forward and with the gradient; documents are of a fifth of a
row. Then, forward, the second half of a row, whose first half is in a cache. Milliseconds on the clock, as ssd_gpu.py
takes them, and the largest difference of cuDNN's results from ours, by norms. Prints a table.
"""

import argparse
import sys
from functools import partial

import jax
import jax.numpy as jnp
from ssd_gpu import differences, of_jax, on_clock, wait

from zamba2_jax import preset
from zamba2_jax.ops import cached_attention, causal_attention


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
        config = preset(model)
        for tokens in options.tokens:
            shape = 1, tokens, config.attention_heads, config.attention_head_dim
            keys = jax.random.split(jax.random.key(0), 3)
            qkv = {name: jax.random.normal(key, shape, jnp.bfloat16) for name, key in zip("qkv", keys, strict=True)}
            ids = jnp.broadcast_to(1 + jnp.arange(tokens) // (tokens // 5), shape[:2])
            for documents, label in ((None, ""), (ids, ", documents")):
                attend = partial(causal_attention, scale=shape[-1] ** -0.5, segment_ids=documents)
                calls = {name: of_jax(partial(attend, implementation=name), qkv) for name in ("xla", "cudnn")}
                expected = calls["xla"][1]()
                for name, pair in calls.items():
                    difference = max(differences(pair[1](), expected))
                    wait(pair[0]())
                    times = "".join(f"{on_clock(call):8.2f}" for call in pair)
                    print(f"{model} {tokens:6} {name + label:18}{times} {difference:.1e}", flush=True)
            half, slots = tokens // 2, jnp.arange(tokens // 2, tokens)[None]
            new, cached = [x[:, half:] for x in qkv.values()], [qkv[name].swapaxes(1, 2) for name in "kv"]
            arguments = *new, *cached, slots, jnp.ones((1, half), bool)
            to_cache = partial(cached_attention, scale=shape[-1] ** -0.5)
            programs = {name: jax.jit(partial(to_cache, implementation=name)) for name in ("xla", "cudnn")}
            expected = programs["xla"](*arguments)
            for name, program in programs.items():
                difference = max(differences(program(*arguments), expected))
                time = on_clock(partial(program, *arguments))
                print(f"{model} {tokens:6} {name + ', cached':18}{time:8.2f}         {difference:.1e}", flush=True)


if __name__ == "__main__":
    main()
