"""How fast is attention on an NVIDIA GPU: ours in plain XLA, cuDNN's, and cuDNN's with documents as a mask?

    python benchmarks/attention_gpu.py [--models zamba2-7b ...] [--tokens 4096 ...]

One row in bfloat16, at the heads of the released models, forward and with the gradient; documents are of a fifth of a
row. Then, forward, the second half of a row, whose first half is in a cache. Milliseconds on the clock, as ssd_gpu.py
takes them too, and the largest difference of cuDNN's results from ours, by norms. Prints a table.
"""

from functools import partial

import jax
import jax.numpy as jnp
from common import RELEASED, differences, on_clock, option_parser, use_gpu, wait, with_gradient

from zamba2_jax import preset
from zamba2_jax.ops import cached_attention, causal_attention


def main() -> None:
    """Prints the table."""
    parser = option_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=RELEASED)
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 8192])
    options = parser.parse_args()
    print(f"{use_gpu().device_kind}: ms forward, ms with the gradient, difference from plain XLA")
    for model in options.models:
        config = preset(model)
        for tokens in options.tokens:
            shape = 1, tokens, config.attention_heads, config.attention_head_dim
            keys = jax.random.split(jax.random.key(0), 3)
            qkv = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
            ids = jnp.broadcast_to(1 + jnp.arange(tokens) // (tokens // 5), shape[:2])
            for documents, label in ((None, ""), (ids, ", documents")):
                attend = partial(causal_attention, scale=shape[-1] ** -0.5, segment_ids=documents)
                passes = {}
                for name in ("xla", "cudnn"):
                    forward = partial(attend, implementation=name)
                    both = partial(with_gradient, forward)
                    passes[name] = [partial(jax.jit(function), *qkv) for function in (forward, both)]
                expected = passes["xla"][1]()
                for name, (forward, both) in passes.items():
                    difference = max(differences(both(), expected))
                    wait(forward())
                    times = "".join(f"{on_clock(call):8.2f}" for call in (forward, both))
                    print(f"{model} {tokens:6} {name + label:18}{times} {difference:.1e}", flush=True)
            half, slots = tokens // 2, jnp.arange(tokens // 2, tokens)[None]
            new, cached = [x[:, half:] for x in qkv], [x.swapaxes(1, 2) for x in qkv[1:]]
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
