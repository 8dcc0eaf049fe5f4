"""How fast does a training step run on this machine's CPU, and in how much memory, beside transformers?

    python experiments/bench_training.py

Needs the `parity` extra. One model of 12 M parameters with every part of Zamba2, from the same weights, on the same
batches of the embedded prose, float32: forward, backward, clipping by global norm, AdamW with the same decay mask. Each
side is a process of its own, with large pages unless `GLIBC_TUNABLES` says otherwise; they take steps in turns. Ours
runs twice: a batch at once, and in four microbatches, which gives the same step in less memory. transformers runs at
the chunk size its scan is fastest with, its clamp of dt set to next to nothing, torch with its fused AdamW. The losses
of the first 50 steps are compared, the last 20 are timed. Prints a table and writes bench_training.json beside this
file.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Read when a process starts, so by the contenders: malloc asks for large pages, which both sides gain by.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from zamba2_jax import Zamba2, Zamba2Config, load_hf, save_hf
from zamba2_jax.train.corpus import tokenize_embedded_corpus
from zamba2_jax.train.data import Batch
from zamba2_jax.train.files import write_json
from zamba2_jax.train.flops import forward_flops
from zamba2_jax.train.optimizer import AdamW
from zamba2_jax.train.step import StepConfig, compile_train_step, init_state

RESULTS = Path(__file__).with_suffix(".json")
CONFIG = Zamba2Config(
    vocab_size=4096,
    hidden_size=320,
    num_layers=8,
    hybrid_layer_ids=(2, 4, 6),
    num_shared_blocks=2,
    mamba_heads=10,
    d_state=64,
    ngroups=1,
    attention_heads=10,
    kv_heads=10,
    ffn_size=960,
    adapter_rank=16,
    attention_adapters=True,
    use_rope=True,
)
ROWS, LENGTH = 8, 256
RATE = 3e-4
OPTIMIZER = AdamW()
OURS = {"ours": StepConfig(), "ours, in 4 parts": StepConfig(microbatches=4)}
TORCH_CHUNKS = {f"transformers, chunk {size}": size for size in (16, 32, 64, 128)}
TRIED, COMPARED, TIMED = 4, 50, 20

Step = Callable[[np.ndarray], float]


class Answer(NamedTuple):
    """Of one step: the loss before it in nats per token, its seconds, the process's peak of memory so far in bytes."""

    loss: float
    seconds: float
    memory: int


def ours(directory: Path, config: StepConfig) -> Step:
    """A training step on tokens [b, t], which gives the loss before it."""
    optimizer = OPTIMIZER.transformation()
    state, compiled = init_state(load_hf(directory), optimizer), None

    def step(tokens: np.ndarray) -> float:
        nonlocal state, compiled
        batch = Batch(tokens=tokens, segment_ids=np.ones_like(tokens))
        if compiled is None:
            schedule = optax.constant_schedule(RATE)
            compiled = compile_train_step(state, batch, optimizer=optimizer, schedule=schedule, config=config)
        state, metrics = compiled(state, batch)
        return float(metrics.loss)

    return step


def theirs(directory: Path, chunk_size: int) -> Step:
    """The same with transformers and torch."""
    import torch

    from zamba2_jax.parity.reference import load

    model = load(directory, CONFIG, "float32", chunk_size).train()
    # A convolution has shape [channels, 1, taps] there: a matrix, as here. All else of one dimension is not decayed.
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": decayed, "weight_decay": OPTIMIZER.weight_decay}, {"params": others, "weight_decay": 0.0}]
    betas = OPTIMIZER.b1, OPTIMIZER.b2
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=betas, eps=OPTIMIZER.eps, fused=True)

    def step(tokens: np.ndarray) -> float:
        rows = torch.from_numpy(tokens).long()
        optimizer.zero_grad()
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        optimizer.step()
        return float(loss.detach())

    return step


def work(name: str, directory: Path, pipe: Connection) -> None:
    """A contender's process: one of `OURS` or of `TORCH_CHUNKS`. Answers tokens [b, t]."""
    step = ours(directory, OURS[name]) if name in OURS else theirs(directory, TORCH_CHUNKS[name])
    while (tokens := pipe.recv()) is not None:
        start = time.perf_counter()
        loss = step(tokens)
        pipe.send(Answer(loss, time.perf_counter() - start, peak_memory()))


def peak_memory() -> int:
    """Largest resident memory of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


class Contender:
    """The other end of a contender's process, with all that it answered."""

    def __init__(self, name: str, directory: Path):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=work, args=(name, directory, other), daemon=True)
        self._process.start()
        self.name = name
        self.answers: list[Answer] = []

    def step(self, tokens: np.ndarray) -> None:
        """Has it take a step on tokens [b, t]."""
        self._pipe.send(tokens)
        self.answers.append(self._pipe.recv())

    def seconds(self, steps: int) -> float:
        """Median of the last steps."""
        return float(np.median([answer.seconds for answer in self.answers[-steps:]]))

    def close(self) -> None:
        """Ends the process."""
        self._pipe.send(None)
        self._process.join()


def batches(count: int) -> np.ndarray:
    """Tokens of the embedded prose, [count, b, t]."""
    documents = tokenize_embedded_corpus(CONFIG.vocab_size).train["prose"]
    tokens = np.concatenate([documents[i] for i in range(len(documents))])
    return np.resize(tokens, (count, ROWS, LENGTH)).astype(np.int32)


def product_seconds() -> float:
    """Time of a step's products with weights, if all ran as fast as the fastest of their shapes does alone."""
    tokens, width, best = ROWS * LENGTH, CONFIG.hidden_size, 0.0
    product = jax.jit(jnp.dot)
    for outputs in (4 * width, 6 * width, CONFIG.vocab_size):
        a, b = jnp.ones((tokens, width)), jnp.ones((width, outputs))
        for _ in range(20):
            start = time.perf_counter()
            jax.block_until_ready(product(a, b))
            best = max(best, 2 * tokens * width * outputs / (time.perf_counter() - start))
    flops = forward_flops(CONFIG, LENGTH)
    return 3 * tokens * (flops.weights + flops.head) / best


def compare(directory: Path) -> list[Contender]:
    """Ours, and last the fastest of theirs, after all steps."""
    mine, others = ([Contender(name, directory) for name in names] for names in (OURS, TORCH_CHUNKS))
    data = batches(COMPARED + TIMED)
    for tokens in data[:TRIED]:
        for contender in (*mine, *others):
            contender.step(tokens)
    fastest = min(others, key=lambda contender: contender.seconds(TRIED - 1))
    for contender in others:
        print(f"{contender.name}: {contender.seconds(TRIED - 1):.3f} s", flush=True)
        if contender is not fastest:
            contender.close()
    for tokens in data[TRIED:]:
        for contender in (*mine, fastest):
            contender.step(tokens)
    for contender in (*mine, fastest):
        contender.close()
    return [*mine, fastest]


def main() -> None:
    """Prints the table and writes the numbers."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    model = Zamba2(CONFIG, rngs=nnx.Rngs(0))
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "model"
        save_hf(model, directory)
        sides = compare(directory)
    products, theirs = product_seconds(), sides[-1]
    results = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(model)), "seconds of the products": products}
    losses = {side.name: np.array([answer.loss for answer in side.answers[:COMPARED]]) for side in sides}
    for side in sides:
        seconds, peak = side.seconds(TIMED), side.answers[-1].memory
        difference = float(np.abs(losses[side.name] - losses[theirs.name]).max())
        print(f"{side.name}: {seconds:.3f} s, {ROWS * LENGTH / seconds:.0f} tokens/s, {peak / 1e9:.2f} GB;", end=" ")
        print(f"of theirs: tokens/s {theirs.seconds(TIMED) / seconds:.2f},", end=" ")
        print(f"memory {peak / theirs.answers[-1].memory:.2f}; losses differ by {difference:.1e}")
        results[side.name] = {
            "seconds": seconds,
            "tokens per second": ROWS * LENGTH / seconds,
            "peak memory": peak,
            "largest difference of the losses": difference,
        }
    print(f"the products alone: {products:.3f} s")
    write_json(RESULTS, results)


if __name__ == "__main__":
    main()
