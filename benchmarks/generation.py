"""How fast does a model write on this machine's CPU, beside transformers? By default one of the 1.2B shape.

    python benchmarks/generation.py                        # everything, some forty minutes
    python benchmarks/generation.py first batch            # any of: first, batch, memory, machine
    python benchmarks/generation.py memory float32         # in float32, or in bfloat16, alone
    python benchmarks/generation.py first batch float32 --preset llama-3.2-1b --rows 1 --prompts 512

Needs the `parity` extra and 16 GB. Random weights, greedy, both sides through their `generate` with a cache,
transformers at the chunk size its scan is fastest with, in float32 and bfloat16. Each contender is a process of its own
with its model; the two of a dtype work in turns, so that a busy machine slows both. Prints tables and writes
generation.json beside this file.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import (
    Contender,
    load_results,
    machine,
    median_seconds,
    medians,
    option_parser,
    save_results,
    use_cpu,
    weight_bytes,
)
from flax import nnx

from zamba2_jax import Zamba2Config, decode_step, generate, init_model, prefill, preset
from zamba2_jax.models.registry import config_json
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.parity.ours import random_model

PRESET = "zamba2-1.2b"
PROMPTS = (128, 512)
BATCHES = (1, 2, 4, 8, 16)
LONG_PROMPT = 4096
ROUNDS = 3
NEW_TOKENS = 16
TORCH_CHUNK = 64
DTYPES = ("float32", "bfloat16")

Generate = Callable[[np.ndarray, int], Any]
"""Continues rows of tokens [b, t] by some more."""
Task = tuple[int, int, int]
"""Rows, tokens of their prompts, new tokens."""


def ours(name: str, dtype: str) -> Generate:
    """With our model of random weights."""
    model = random_model(preset(name), seed=0, dtype=dtype)
    return lambda prompts, new: generate(model, prompts.tolist(), new, slots=len(prompts))


def theirs(name: str, dtype: str) -> Generate:
    """The same with transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(their_config(preset(name)))
    model = model.to(getattr(torch, dtype)).to_empty(device="cpu").eval()
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        for buffer in model.buffers():
            buffer.fill_(0.01)

    def run(prompts: np.ndarray, new: int) -> Any:
        tokens = torch.from_numpy(prompts)
        options = {"attention_mask": torch.ones_like(tokens), "do_sample": False, "eos_token_id": None}
        with torch.inference_mode():
            return model.generate(tokens, max_new_tokens=new, min_new_tokens=new, **options)

    return run


def their_config(config: ModelConfig) -> Any:
    """The architecture for transformers."""
    from transformers import AutoConfig

    from zamba2_jax.parity.reference import reference_config

    if isinstance(config, Zamba2Config):
        return reference_config(config, TORCH_CHUNK)
    return AutoConfig.for_model(**config_json(config))


def task_runner(contender: str, name: str) -> Callable[[int, int, int], None]:
    """What a contender's process does with a `Task`."""
    side, dtype = contender.split()
    write = ours(name, dtype) if side == "ours" else theirs(name, dtype)

    def run(b: int, t: int, new: int) -> None:
        write(np.random.default_rng(0).integers(3, preset(name).vocab_size, (b, t)), new)

    return run


Pair = tuple[Contender, Contender]
"""Ours, and transformers."""


class Amount(NamedTuple):
    """How much is measured: lengths of prompts, numbers of rows, and turns."""

    prompts: Sequence[int]
    rows: Sequence[int]
    rounds: int


def seconds(pair: Pair, tasks: list[Task], turns: int) -> np.ndarray:
    """Medians by task and contender, taken in turns, after one round to warm up."""
    rounds = [[[contender(*task).seconds for contender in pair] for task in tasks] for _ in range(turns + 1)]
    return np.median(rounds[1:], axis=0)


def first(pair: Pair, amount: Amount) -> dict[str, list[float]]:
    """Seconds to the first token of one row, by the length of the prompt."""
    found = seconds(pair, [(1, t, 1) for t in amount.prompts], amount.rounds)
    of_prompts = zip(amount.prompts, found, strict=True)
    return {f"prompt of {t}: seconds to the first token": row.tolist() for t, row in of_prompts}


def batch(pair: Pair, amount: Amount) -> dict[str, list[float]]:
    """Tokens per second after prompts of 32, by the number of rows."""
    result = {}
    for b in amount.rows:
        begin, end = seconds(pair, [(b, 32, 1), (b, 32, 1 + NEW_TOKENS)], amount.rounds)
        result[f"rows {b}: tokens per second"] = (b * NEW_TOKENS / (end - begin)).tolist()
    return result


def memory(pair: Pair, amount: Amount) -> dict[str, list[float]]:
    """Peak of resident memory for one long prompt, the model included."""
    del amount
    return {f"prompt of {LONG_PROMPT}: peak memory, GB": [side(1, LONG_PROMPT, 1).memory / 1e9 for side in pair]}


def context() -> dict[str, float]:
    """Milliseconds of a step of zamba2-nano after many tokens and after few."""
    model, result = init_model(preset("zamba2-nano"), rngs=nnx.Rngs(0)), {}
    for t in (1024, 16384):
        _, cache = prefill(model, jnp.ones((1, t), jnp.int32), capacity=t + 64)
        step = partial(decode_step, model, jnp.ones(1, jnp.int32), cache)
        result[f"zamba2-nano, a step after {t} tokens: ms"] = 1e3 * median_seconds(step, rounds=40)
    return result


def limit() -> dict[str, float]:
    """How near one row in float32 comes to what its weights allow at the speed of the memory.

    That is by the product of a vector and a matrix of 1 GiB, in turns with the rest.
    """
    run, prompts = ours(PRESET, "float32"), np.arange(3, 35)[None]
    once, every_call = weight_bytes(preset(PRESET), "float32")
    matrix, vector = jnp.ones((2**14, 2**14), jnp.float32), jnp.ones(2**14, jnp.float32)
    calls = {
        "first": partial(run, prompts, 1),
        "all": partial(run, prompts, 1 + NEW_TOKENS),
        "read": partial(jax.jit(jnp.dot), vector, matrix),
    }
    found = medians(calls, 4 * ROUNDS)
    rate, speed = NEW_TOKENS / (found["all"] - found["first"]), matrix.nbytes / found["read"]
    return {
        "memory: GB per second": speed / 1e9,
        "one row: tokens per second": rate,
        "one row: of what the weights allow, the shared blocks read at every call": rate * every_call / speed,
        "one row: of what they allow, each read once": rate * once / speed,
    }


def show(results: dict[str, dict[str, float]]) -> None:
    """Prints a line per number, with what ours is of theirs."""
    for dtype in DTYPES:
        mine, theirs = (results.get(f"{side} {dtype}", {}) for side in ("ours", "transformers"))
        for key in filter(theirs.__contains__, mine):
            ratio = mine[key] / theirs[key]
            print(f"{dtype}, {key}: {mine[key]:.3f}, transformers {theirs[key]:.3f}, ratio {ratio:.2f}", flush=True)


def main() -> None:
    """Runs the named tasks, or all, and writes what they found."""
    tasks = {task.__name__: task for task in (first, batch, memory)}
    parser = option_parser(__doc__)
    words = (*tasks, "machine", *DTYPES)
    parser.add_argument("words", nargs="*", metavar="WORD", help=f"any of {', '.join(words)}; all by default")
    parser.add_argument("--preset", default=PRESET, help="the architecture, also of transformers")
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS, help="lengths, of the task first")
    parser.add_argument("--rows", type=int, nargs="+", default=BATCHES, help="of the task batch")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each contender")
    options = parser.parse_args()
    if unknown := set(options.words) - set(words):
        parser.error(f"{', '.join(sorted(unknown))}: expected any of {', '.join(words)}")
    asked = [dtype for dtype in DTYPES if dtype in options.words] or DTYPES
    chosen = [word for word in options.words if word not in DTYPES] or [*tasks, "machine"]
    amount = Amount(options.prompts, options.rows, options.rounds)
    if min(*amount.prompts, *amount.rows, amount.rounds) < 1:
        parser.error(f"{amount}: expected numbers >= 1")
    use_cpu()
    saved: dict[str, Any] = load_results(__file__)
    results: dict[str, dict[str, Any]] = saved if options.preset == PRESET else saved.setdefault(options.preset, {})
    results["measured on"] = machine("torch", "transformers")
    for dtype in asked if set(chosen) != {"machine"} else ():
        sides = (f"ours {dtype}", f"transformers {dtype}")
        pair = Contender(sides[0], task_runner, options.preset), Contender(sides[1], task_runner, options.preset)
        for task in filter(tasks.__contains__, chosen):
            for key, values in tasks[task](pair, amount).items():
                for contender, value in zip(pair, values, strict=True):
                    results.setdefault(contender.name, {})[key] = value
            save_results(__file__, saved)
        for contender in pair:
            contender.close()
        print(dtype, "is done", file=sys.stderr, flush=True)
    show(results)
    if "machine" in chosen:
        for key, value in (context() | limit()).items():
            print(f"{key}: {value:.2f}")
            results.setdefault("machine", {})[key] = value
        save_results(__file__, saved)


if __name__ == "__main__":
    main()
