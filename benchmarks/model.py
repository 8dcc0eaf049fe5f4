"""How long do a full pass and a gradient of a whole model take on this machine?

    python benchmarks/model.py [--models zamba2-7b ...]

Medians of 5 calls, random weights. On a CPU, in float32: zamba2-nano, which the demo trains, at 8 rows of 256 tokens,
and of each model named 6 layers with one call of a shared block, at one row of 1024. To compare two versions of the
package, run it with each on PYTHONPATH, in turns. On a GPU, in bfloat16: the same 6 layers at 4 rows of 4096 tokens,
packed documents of 1000 or one document each, with the kernels that are the default there and in plain XLA.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from common import median_seconds, option_parser, use_cpu
from flax import nnx

from zamba2_jax import Backend, Zamba2Config, default_backend, init_model, next_token_loss, preset


def layers(name: str) -> Zamba2Config:
    """The model of a preset, cut to 6 layers and one call of a shared block."""
    return preset(name, num_layers=6, hybrid_layer_ids=(5,), num_shared_blocks=1)


def passes(backend: Backend) -> list[Any]:
    """A full pass, and the loss with its gradient, of a model, tokens and ids of documents."""

    def forward(model: Any, tokens: jax.Array, ids: jax.Array | None) -> jax.Array:
        return model(tokens, ids, backend=backend)

    def loss(model: Any, tokens: jax.Array, ids: jax.Array | None) -> jax.Array:
        return next_token_loss(model, tokens, ids, backend=backend)[0]

    return [jax.jit(forward), jax.jit(jax.value_and_grad(loss))]


def measure(
    config: Zamba2Config, shape: tuple[int, int], dtype: str, cases: dict[str, tuple[int | None, Backend]]
) -> None:
    """Prints a line for each case: tokens per document, or None for a row, and how ops are computed."""
    model = init_model(config, rngs=nnx.Rngs(0), dtype=dtype)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, config.vocab_size)
    programs = {}
    for name, (document, backend) in cases.items():
        ids = None if document is None else jnp.broadcast_to(1 + jnp.arange(shape[1]) // document, shape)
        programs[name] = ids, [program.lower(model, tokens, ids) for program in passes(backend)]
    with ThreadPoolExecutor() as pool:
        compiling = {name: [pool.submit(p.compile) for p in lowered] for name, (_, lowered) in programs.items()}
    for name, (ids, _) in programs.items():
        forward, gradient = (median_seconds(partial(p.result(), model, tokens, ids)) for p in compiling[name])
        print(f"{name}: forward {1e3 * forward:.1f} ms, loss and gradient {1e3 * gradient:.1f} ms", flush=True)


def main() -> None:
    """Prints a line per model, or several."""
    parser = option_parser(__doc__)
    parser.add_argument("--models", nargs="*")
    models = parser.parse_args().models
    if not os.path.exists("/dev/nvidiactl"):
        use_cpu()
    if jax.default_backend() == "cpu":
        backend = default_backend(jnp.float32)
        for name in ["zamba2-1.2b"] if models is None else models:
            measure(layers(name), (1, 1024), "float32", {f"6 layers of {name}, 1 x 1024": (None, backend)})
        nano = preset("zamba2-nano")
        measure(nano, (8, 256), "float32", {"zamba2-nano, 8 x 256": (None, backend)})
        return
    sides = {"kernels": default_backend(jnp.bfloat16), "plain XLA": Backend()}
    documents = {"documents of 1000": 1000, "one document": None}
    for name in models or ["zamba2-7b", "zamba2-1.2b"]:
        names = f"6 layers of {name}, 4 x 4096, {{}}, {{}}"
        cases = {names.format(d, s): (documents[d], sides[s]) for d in documents for s in sides}
        measure(layers(name), (4, 4096), "bfloat16", cases)


if __name__ == "__main__":
    main()
