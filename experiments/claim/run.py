"""Counts, compiles and measures what README.md beside this file asks.

    python experiments/claim/run.py              # what can be counted: seconds
    python experiments/claim/run.py --compile    # and the plans for a slice of TPU v5e: minutes each, extra `tpu`
    python experiments/claim/run.py --measure    # and times on the device that is there: 16 GB, minutes
    python experiments/claim/run.py --quick      # all of it with small models, in a minute, to see that it runs

Writes results.json and figure.png. What is in results.json already is not compiled or measured again, so that a run
that was broken off goes on; counts are made anew.
"""

import argparse
import dataclasses
import json
import re
import statistics
import time
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from zamba2_jax import cache_bytes, generate, init_model, preset
from zamba2_jax.inference.decode import rounded_capacity
from zamba2_jax.models.base import LanguageModel
from zamba2_jax.models.cache import init_cache
from zamba2_jax.models.flops import PartFlops, count_parameters, forward_flops, prefill_flops, step_flops
from zamba2_jax.plan.chips import CHIPS, describe_slice
from zamba2_jax.plan.inference import InferenceJob, estimate_inference
from zamba2_jax.train.peak import PEAK_FLOPS

HERE = Path(__file__).parent
CONTEXTS = (128, 512, 2048, 8192, 32768, 131072)
ROWS = (1, 8, 64)
RIVALS = {
    "zamba2-7b": ("llama-3-8b", "mistral-7b-v0.1", "gemma-7b-shape"),
    "zamba2-2.7b": ("phi-3-mini-shape", "mamba2-2.7b"),
    "zamba2-1.2b": ("llama-3.2-1b",),
}
MEASURED = ("zamba2-1.2b", "llama-3.2-1b")
PROMPTS = (128, 512, 2048)
STEPS = ((1, 128), (1, 2048), (4, 2048))
"""Rows, and tokens in each."""
COMPILED = tuple(
    (task, model, length, rows)
    for task, length, rows in (("decode", 2048, 8), ("decode", 32768, 1), ("prefill", 2048, 1))
    for model in ("zamba2-7b", "llama-3-8b")
)
"""Tasks, models, tokens of a row and rows to plan."""
SQUARE = 2**12
"""Rows of the matrices by which the speed of a device is measured."""
LESS_TIME, MORE_TOKENS = 0.75, 1.2
"""The claim: 25 % less time to the first token, 20 % more tokens per second."""


class Device(NamedTuple):
    """What a roofline is made of.

    Attributes:
        flops: operations per second.
        bandwidth: bytes of memory per second.
        memory: bytes.
        dtype: of weights and caches.
    """

    flops: float
    bandwidth: float
    memory: float
    dtype: str


V5E = CHIPS["v5e"]
# nvidia.com/en-us/data-center/h200: 141 GB at 4.8 TB/s. Eight v5e as if they were one chip.
DEVICES = {
    "H200": Device(PEAK_FLOPS["NVIDIA H200"], 4.8e12, 141e9, "bfloat16"),
    "8 v5e": Device(8 * V5E.flops, 8 * V5E.memory_bandwidth, 8 * V5E.memory, "bfloat16"),
}


class Counts(NamedTuple):
    """Of one row of a model.

    Attributes:
        dense, causal: FLOPs to the first token; attention to all tokens of the row, or to those that are seen.
        step: FLOPs of the next token.
        met: weights that a token is multiplied with, as often as it is.
        stored: parameters.
        states: bytes that are read and written by every step.
        keys: bytes of keys and values.
    """

    dense: int
    causal: int
    step: int
    met: int
    stored: int
    states: int
    keys: int


def main() -> None:
    """Runs the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="also plans for TPU v5e")
    parser.add_argument("--measure", action="store_true", help="also times on the device that is there")
    parser.add_argument("--pair", nargs=2, default=MEASURED, metavar="PRESET", help="models to measure, in turns")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each model")
    parser.add_argument("--quick", action="store_true", help="small models, one turn, a plan for a CPU")
    parser.add_argument("--output", type=Path, default=HERE, help="directory for results.json and figure.png")
    options = parser.parse_args()
    if options.rounds < 1 or not options.output.is_dir():
        parser.error(f"--rounds {options.rounds} --output {options.output}: expected a number >= 1 and a directory")
    rivals, contexts = RIVALS, CONTEXTS
    compiled, topology = (COMPILED if options.compile else ()), "v5e:2x4"
    prompts, steps = (PROMPTS, STEPS) if options.measure else ((), ())
    if options.quick:
        options.pair, options.rounds = ("zamba2-nano", "transformer-nano"), 1
        rivals, contexts = {"zamba2-nano": ("transformer-nano",)}, (32, 128)
        compiled, topology = (("decode", "transformer-nano", 64, 1),), "cpu:1"
        prompts, steps = (32,), ((1, 32),)

    path = options.output / "results.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results["counted"] = counted(rivals, contexts)

    def save() -> None:
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    save()
    if prompts:
        measure(results.setdefault("measured", {}), options.pair, prompts, steps, options.rounds, save)
    plan(results.setdefault("compiled", {}), compiled, topology, save)
    save()
    plot(rivals, contexts, options.output / "figure.png")
    print("\n\n".join([table_of_counts(rivals), *tables_of_ratios(rivals, contexts, results), table_of_rest(results)]))


@cache
def count(model: str, context: int, dtype: str = "bfloat16") -> Counts:
    """The counts of a preset at a context of so many tokens."""
    config = preset(model)
    alone, row = forward_flops(config, 1), forward_flops(config, context)
    nothing = PartFlops(0)
    seen, pair = (of.layers.get("attention", nothing).mixing for of in (row, alone))
    most = seen // pair if pair else 0  # tokens that one sees at most, and that a cache holds
    hidden = pair * (context * most - (most * (most + 1) // 2 + (context - most) * most))
    dense, (stored, states, key) = prefill_flops(config, context), _sizes(model, dtype)
    return Counts(
        dense=dense,
        causal=dense - hidden,
        step=step_flops(config, context),
        met=(alone.weights + sum(alone.ends.values())) // 2,
        stored=stored,
        states=states,
        keys=key * most,
    )


@cache
def _sizes(model: str, dtype: str) -> tuple[int, int, int]:
    """Parameters; bytes of the states of a row; bytes of keys and values of a token."""
    size = cache_bytes(preset(model), 1, 1, dtype)
    return sum(count_parameters(preset(model)).values()), size.constant, size.per_token


def counted(rivals: dict[str, tuple[str, ...]], contexts: Iterable[int]) -> dict[str, dict[str, dict[str, int]]]:
    """The counts of all models, by context."""
    models = [model for ours, theirs in rivals.items() for model in (ours, *theirs)]
    return {model: {str(context): count(model, context)._asdict() for context in contexts} for model in models}


def first_token(model: str, device: Device, rows: int, context: int) -> float:
    """Seconds until prompts are taken in, at least: operations, or weights and caches through the memory."""
    of, item = count(model, context, device.dtype), jnp.dtype(device.dtype).itemsize
    moved = item * of.met + rows * (of.keys + of.states)
    return max(rows * of.causal / device.flops, moved / device.bandwidth)


def step_bytes(model: str, device: Device, rows: int, context: int) -> float:
    """Bytes through the memory for one more token of all rows: weights as often as met, keys, states twice."""
    of, item = count(model, context, device.dtype), jnp.dtype(device.dtype).itemsize
    return item * of.met + rows * (of.keys + 2 * of.states)


def tokens_per_second(model: str, device: Device, rows: int, context: int) -> float:
    """Of all rows, at most."""
    of = count(model, context, device.dtype)
    moved = step_bytes(model, device, rows, context)
    return rows / max(rows * of.step / device.flops, moved / device.bandwidth)


def fits(model: str, device: Device, rows: int, context: int) -> bool:
    """Whether weights and caches do."""
    of, item = count(model, context, device.dtype), jnp.dtype(device.dtype).itemsize
    return item * of.stored + rows * (of.keys + of.states) <= device.memory


def crossing(ours: str, theirs: str, target: float, kind: str) -> int | None:
    """The first context at which ours takes `target` times their operations to the first token; None up to 2^21."""

    def below(context: int) -> bool:
        return getattr(count(ours, context), kind) <= target * getattr(count(theirs, context), kind)

    low, high = 0, 2**21
    if not below(high):
        return None
    while high - low > max(1, high // 200):
        middle = (low + high) // 2
        low, high = (low, middle) if below(middle) else (middle, high)
    return high


Call = Callable[[], float]


def measure(
    measured: dict[str, Any],
    pair: Iterable[str],
    prompts: Iterable[int],
    steps: Iterable[tuple[int, int]],
    rounds: int,
    save: Callable[[], None],
) -> None:
    """Times of models in turns, each after one turn to warm up: seconds to the first token, and of a step."""
    device = jax.devices()[0]
    dtype = "float32" if device.platform == "cpu" else "bfloat16"
    here = measured.setdefault(f"{_device_name(device)}, {dtype}, {' against '.join(pair)}", {})
    todo = {f"step of {rows} x {n}": partial(_step_call, rows, n) for rows, n in steps}
    todo |= {f"prompt of {n}": partial(_first_token_call, n) for n in prompts}
    todo = {task: make for task, make in todo.items() if task not in here}
    if not todo:
        return
    models = {model: init_model(preset(model), rngs=nnx.Rngs(0), dtype=dtype) for model in pair}
    for task, make in todo.items():
        calls = {name: make(model) for name, model in models.items()}
        here[task] = in_turns(calls, rounds)
        print(task, here[task], flush=True)
        save()
    size = SQUARE if max(model.config.hidden_size for model in models.values()) > 1000 else SQUARE // 16
    speed = {name: min(times) for name, times in in_turns(_speed_calls(size), 5).items()}
    here["flops"], here["bandwidth"] = 2 * size**3 / speed["product"], 4 * (4 * size) ** 2 / speed["read"]


def in_turns(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, by round."""
    for call in calls.values():
        call()
    turns = [{name: call() for name, call in calls.items()} for _ in range(rounds)]
    return {name: [turn[name] for turn in turns] for name in calls}


def _first_token_call(length: int, model: LanguageModel) -> Call:
    prompt = np.random.default_rng(0).integers(3, model.config.vocab_size, length).tolist()

    def call() -> float:
        start = time.perf_counter()
        generate(model, [prompt], 1)
        return time.perf_counter() - start

    return call


def _step_call(rows: int, context: int, model: LanguageModel) -> Call:
    """Of rows whose caches hold zeros, which take as long as anything else."""
    step = jax.jit(lambda model, token, cache: model.step(token, cache), donate_argnums=2)
    token, number = jnp.ones(rows, jnp.int32), 8
    empty = jax.jit(partial(init_cache, model.config, rows, rounded_capacity(context + number), model.dtype))

    def call() -> float:
        cache = empty().replace(lengths=jnp.full(rows, context, jnp.int32))
        logits, cache = jax.block_until_ready(step(model, token, cache))
        start = time.perf_counter()
        for _ in range(number - 1):
            logits, cache = step(model, token, cache)
        jax.block_until_ready(logits)
        return (time.perf_counter() - start) / (number - 1)

    return call


def _speed_calls(size: int) -> dict[str, Call]:
    """What the device does: a product of matrices of `size` rows, and one of 4 times as many with a vector."""
    square, tall, vector = jnp.ones((size, size)), jnp.ones((4 * size, 4 * size)), jnp.ones(4 * size)
    product = jax.jit(jnp.dot)

    def timed(*arrays: jax.Array) -> float:
        start = time.perf_counter()
        jax.block_until_ready(product(*arrays))
        return time.perf_counter() - start

    return {"product": partial(timed, square, square), "read": partial(timed, vector, tall)}


def _device_name(device: jax.Device) -> str:
    if device.platform != "cpu":
        return device.device_kind
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else device.device_kind


def plan(
    compiled: dict[str, Any],
    jobs: Iterable[tuple[str, str, int, int]],
    topology: str,
    save: Callable[[], None],
) -> None:
    """What the compiler makes of each job, as `zamba2 plan` does, all chips in `tensor`."""
    for task, model, length, rows in jobs:
        name = f"{model} {task} {rows} x {length} on {topology}"
        if name in compiled:
            continue
        slice = describe_slice(topology)
        job = InferenceJob(task=task, config=preset(model), batch=rows, length=length)  # type: ignore[arg-type]
        compiled[name] = dataclasses.asdict(estimate_inference(job, slice, {"tensor": len(slice.devices)}))
        print(name, flush=True)
        save()


def table_of_counts(rivals: dict[str, tuple[str, ...]]) -> str:
    """Per model, in bfloat16."""
    lines = ["| model | parameters | weights met by a token | keys and values, kB per token | states, MB per row |"]
    lines.append("|---|---|---|---|---|")
    for model in dict.fromkeys(model for ours, theirs in rivals.items() for model in (ours, *theirs)):
        of = count(model, 128)
        sizes = f"{of.stored / 1e9:.2f} B | {of.met / 1e9:.2f} B | {of.keys / 128e3:.0f} | {of.states / 1e6:.0f}"
        lines.append(f"| {model} | {sizes} |")
    return "\n".join(lines)


def devices(results: dict[str, Any]) -> dict[str, Device]:
    """With the CPU of the measurements, if there are any, at the speed that was measured."""
    found = dict(DEVICES)
    for name, tasks in results.get("measured", {}).items():
        if "float32" in name and "flops" in tasks:
            found["CPU"] = Device(tasks["flops"], tasks["bandwidth"], 16e9, "float32")
    return found


def tables_of_ratios(rivals: dict[str, tuple[str, ...]], contexts: Iterable[int], results: dict[str, Any]) -> list[str]:
    """Ours against theirs: operations to the first token, and by roofline time to it and tokens per second."""
    contexts = list(contexts)
    head = " | ".join(f"{context:,}" for context in contexts)
    rule = "|---" * (len(contexts) + 1)
    pairs = [(ours, rival) for ours, theirs in rivals.items() for rival in theirs]
    lines = [f"| operations to the first token | {head} | equal at | x 0.75 at |", f"{rule}|---|---|"]
    for ours, theirs in pairs:
        for kind in ("causal", "dense"):
            cells = (getattr(count(ours, n), kind) / getattr(count(theirs, n), kind) for n in contexts)
            places = (crossing(ours, theirs, target, kind) for target in (1.0, LESS_TIME))
            ends = " | ".join("never" if place is None else f"{place:,}" for place in places)
            lines.append(f"| {ours} / {theirs}, {kind} | {' | '.join(f'{cell:.2f}' for cell in cells)} | {ends} |")
    tables = ["\n".join(lines)]
    for title, value in {"time to the first token": first_token, "tokens per second": tokens_per_second}.items():
        lines = [f"| {title}, roofline | {head} |", f"{rule}|"]
        for place, device in devices(results).items():
            for ours, theirs in pairs:
                for rows in ROWS:
                    cells = [
                        f"{value(ours, device, rows, n) / value(theirs, device, rows, n):.2f}"
                        if all(fits(model, device, rows, n) for model in (ours, theirs))
                        else "-"
                        for n in contexts
                    ]
                    lines.append(f"| {place}, {ours} / {theirs}, {rows} rows | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return tables


def table_of_rest(results: dict[str, Any]) -> str:
    """What was compiled and measured."""
    lines = ["| compiled | compute | memory | network | tokens/s at most |", "|---|---|---|---|---|"]
    for name, of in results["compiled"].items():
        times = " | ".join(f"{1e3 * of[key]:.3g} ms" for key in ("compute", "memory_time", "network"))
        lines.append(f"| {name} | {times} | {of['tokens_per_second']:,.0f} |")
    for device, tasks in results.get("measured", {}).items():
        lines += ["", f"| {device} | seconds, median and range | |", "|---|---|---|"]
        for task, times in ((task, of) for task, of in tasks.items() if isinstance(of, dict)):
            cells = (
                f"{name}: {statistics.median(of):.4g} ({min(of):.4g} to {max(of):.4g})" for name, of in times.items()
            )
            lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rivals: dict[str, tuple[str, ...]], contexts: tuple[int, ...], path: Path) -> None:
    """On the left operations to the first token, on the right tokens per second on an H200, ours over theirs."""
    figure = Figure(figsize=(11, 4.5), dpi=130, layout="constrained")
    first, step = figure.subplots(1, 2)
    grid = np.unique(np.geomspace(contexts[0], contexts[-1], 40).astype(int)).tolist()
    device = DEVICES["H200"]
    pairs = [(ours, rival) for ours, theirs in rivals.items() for rival in theirs]
    for i, (ours, theirs) in enumerate(pairs):
        for kind, line in (("causal", "-"), ("dense", ":")):
            ratios = [getattr(count(ours, n), kind) / getattr(count(theirs, n), kind) for n in grid]
            label = f"{ours} / {theirs}" if kind == "causal" else None
            first.plot(grid, ratios, line, color=f"C{i}", linewidth=1.2, label=label)
        for rows, line in zip(ROWS, ("-", "--", ":"), strict=True):
            ratios = [
                tokens_per_second(ours, device, rows, n) / tokens_per_second(theirs, device, rows, n)
                if all(fits(model, device, rows, n) for model in (ours, theirs))
                else np.nan
                for n in grid
            ]
            label = f"{rows} row{'s' * (rows > 1)}" if not i else None
            step.plot(grid, ratios, line, color=f"C{i}", linewidth=1.2, label=label)
    for axes, claim in ((first, LESS_TIME), (step, MORE_TOKENS)):
        axes.axhline(claim, color="black", linewidth=0.8)
        axes.annotate("the claim", (grid[0], claim), (0, 3), textcoords="offset points", fontsize=7)
    first.set(title="Operations to the first token; dotted: attention as dense", xlabel="tokens of the prompt")
    step.set(title="Tokens per second, roofline, H200", xlabel="tokens in the cache")
    ticks = ["0.1", "0.2", "0.4", "0.6", "0.8", "1", "1.2", "1.5", "2", "3", "5"]
    for axes in (first, step):
        axes.set(xscale="log", yscale="log", ylabel="ours / theirs")
        axes.set_yticks([float(tick) for tick in ticks], ticks)
        axes.set_yticks([], minor=True)
        axes.axhline(1, color="gray", linewidth=0.5)
        axes.legend(fontsize=7)
    figure.savefig(path)


if __name__ == "__main__":
    main()
