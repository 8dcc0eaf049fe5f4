"""How much memory does attention need besides its arguments and results: by blocks, as a kernel, and as JAX's own?

Asks the compilers about one row of t tokens of each released model: of the CPU in float32, and, with the `tpu` extra,
of a TPU v5e that is not there, in bfloat16. "jax" is `jax.nn.dot_product_attention`, "xla" and "splash" are
implementations of `ops.causal_attention`. Backward is the whole gradient, given the cotangent of the output. Bytes
moved are left out: the compilers count the body of a loop once. Prints a table and writes attention_memory.json beside
this file.

    python benchmarks/attention_memory.py [--models zamba2-7b ...] [--tokens 2048 ...]
"""

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from common import RELEASED, gradient, option_parser, save_results, use_absent_tpus, use_cpu
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from zamba2_jax import preset
from zamba2_jax.ops import causal_attention

LENGTHS = (2048, 8192, 32768)
DTYPES = {"cpu": jnp.float32, "v5e": jnp.bfloat16}
IMPLEMENTATIONS = {"cpu": ("jax", "xla"), "v5e": ("jax", "xla", "splash")}


def attention(name: str, scale: float) -> Callable[..., jax.Array]:
    """Causal attention to q, k and v."""
    if name == "jax":
        return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True)
    return lambda q, k, v: causal_attention(q, k, v, scale, implementation=name)


def temp_bytes(function: Callable[..., Any], *arguments: Any) -> int | None:
    """None if the compiler finds that the chip's memory does not suffice."""
    try:
        return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def main() -> None:
    """Prints the table and writes it."""
    parser = option_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=RELEASED)
    parser.add_argument("--tokens", nargs="+", type=int, default=LENGTHS)
    options = parser.parse_args()
    use_cpu()
    use_absent_tpus()
    devices = {"cpu": jax.devices("cpu")[0]}
    if importlib.util.find_spec("libtpu") is not None:
        devices["v5e"] = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    rows = []
    print(f"{'device':7}{'model':13}{'p':>4}{'t':>7}  {'implementation':15}{'forward/MB':>11}{'backward/MB':>12}")
    for (where, device), model, t in itertools.product(devices.items(), options.models, options.tokens):
        config = preset(model)
        h, kv, p = config.attention_heads, config.kv_heads, config.attention_head_dim
        q, k = (
            jax.ShapeDtypeStruct((1, t, heads, p), DTYPES[where], sharding=SingleDeviceSharding(device))
            for heads in (h, kv)
        )
        for name in IMPLEMENTATIONS[where]:
            function = attention(name, config.attention_scale)
            forward, backward = temp_bytes(function, q, k, k), temp_bytes(gradient(function), (q, k, k), q)
            rows.append(
                {"device": where, "model": model, "head_dim": p, "t": t, "dtype": jnp.dtype(DTYPES[where]).name}
                | {"implementation": name, "forward_temp_bytes": forward, "backward_temp_bytes": backward}
            )
            shown = ["too much" if size is None else f"{size / 1e6:.0f}" for size in (forward, backward)]
            print(f"{where:7}{model:13}{p:4}{t:7}  {name:15}{shown[0]:>11}{shown[1]:>12}", flush=True)
    save_results(__file__, rows)


if __name__ == "__main__":
    main()
