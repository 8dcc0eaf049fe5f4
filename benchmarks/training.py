"""How fast does a training step run on this machine's CPU, and in how much memory, beside transformers?

    python benchmarks/training.py

Needs the `parity` extra. One model of 12 M parameters with every part of Zamba2, from the same weights, on the same
batches of the embedded prose, float32: forward, backward, clipping by global norm, AdamW with the same decay mask. Each
side is a process of its own, with large pages unless `GLIBC_TUNABLES` says otherwise; they take turns of five steps,
as the steps of a run follow each other. The first of a turn is not timed: while others work, a virtual machine gives
back the memory that a process has freed. Ours runs three times: a batch at once; in four microbatches, which gives the
same step in less memory; and on two devices, which are one core each, with half of the rows. transformers runs at the
chunk size its scan is fastest with, its clamp of dt set to next to nothing, torch with its fused AdamW. The losses of
the first 50 steps are compared, the last 25 are timed. Prints a table and writes training.json beside this file.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Answer, Contender, machine, option_parser, save_results, use_cpu, use_large_pages
from flax import nnx

from zamba2_jax import Zamba2Config, init_model, load_hf, save_hf
from zamba2_jax.data.batches import Batch
from zamba2_jax.data.corpus import tokenize_embedded_corpus
from zamba2_jax.models.flops import forward_flops
from zamba2_jax.parallel.hosts import place
from zamba2_jax.parallel.mesh import make_mesh
from zamba2_jax.train.optimizer import AdamW
from zamba2_jax.train.step import StepConfig, compile_train_step, init_state

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
OURS = {
    "ours": (StepConfig(), 1),
    "ours, in 4 parts": (StepConfig(microbatches=4), 1),
    "ours, in 2 parts on 2 devices": (StepConfig(microbatches=2), 2),
}
"""How a step is computed, and on how many devices, each with its rows of the batch."""
TORCH_CHUNKS = {f"transformers, chunk {size}": size for size in (16, 32, 64, 128)}
TURN, COMPARED, TIMED = 5, 50, 25

Step = Callable[[np.ndarray], float]


def ours(directory: Path, config: StepConfig, devices: int) -> Step:
    """A training step on tokens [b, t], which gives the loss before it."""
    jax.config.update("jax_num_cpu_devices", devices)
    mesh, optimizer = make_mesh(data=devices), OPTIMIZER.transformation()
    with jax.set_mesh(mesh):
        state, compiled = init_state(load_hf(directory, mesh=mesh), optimizer), None

    def step(tokens: np.ndarray) -> float:
        nonlocal state, compiled
        with jax.set_mesh(mesh):
            batch = place(Batch(tokens=tokens, segment_ids=np.ones_like(tokens)), mesh, len(tokens))
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


def side(name: str, directory: Path) -> Step:
    """What a contender's process does with tokens: one of `OURS` or of `TORCH_CHUNKS`."""
    return ours(directory, *OURS[name]) if name in OURS else theirs(directory, TORCH_CHUNKS[name])


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
    return 3 * tokens * (flops.total - flops.mixing) / best


def compare(directory: Path) -> dict[str, list[Answer]]:
    """What ours and, last, the fastest of theirs answered at every step."""
    mine, others = ([Contender(name, side, directory) for name in names] for names in (OURS, TORCH_CHUNKS))
    data = batches(COMPARED + TIMED)
    answers: dict[str, list[Answer]] = {contender.name: [] for contender in (*mine, *others)}

    def take_steps(contenders: list[Contender], rows: np.ndarray) -> None:
        for turn in range(0, len(rows), TURN):
            for contender in contenders:
                answers[contender.name] += [contender(tokens) for tokens in rows[turn : turn + TURN]]

    take_steps([*mine, *others], data[:TURN])
    fastest = min(others, key=lambda contender: seconds(answers[contender.name]))
    for contender in others:
        print(f"{contender.name}: {seconds(answers[contender.name]):.3f} s", flush=True)
        if contender is not fastest:
            contender.close()
    left = [*mine, fastest]
    take_steps(left, data[TURN:])
    for contender in left:
        contender.close()
    return {contender.name: answers[contender.name] for contender in left}


def seconds(answers: list[Answer]) -> float:
    """The median, of all but the first of each turn."""
    return float(np.median([answer.seconds for i, answer in enumerate(answers) if i % TURN]))


def main() -> None:
    """Prints the table and writes the numbers."""
    option_parser(__doc__).parse_args()
    use_cpu()
    use_large_pages()
    model = init_model(CONFIG, rngs=nnx.Rngs(0))
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "model"
        save_hf(model, directory)
        sides = compare(directory)
    products = product_seconds()
    results: dict[str, Any] = {
        "measured on": machine("torch", "transformers"),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model)),
        "seconds of the products": products,
    }
    losses = {name: np.array([answer.value for answer in answers[:COMPARED]]) for name, answers in sides.items()}
    times = {name: seconds(answers[-TIMED:]) for name, answers in sides.items()}
    peaks = {name: max(answer.memory for answer in answers) for name, answers in sides.items()}
    *_, theirs = sides
    for name in sides:
        rate, difference = ROWS * LENGTH / times[name], float(np.abs(losses[name] - losses[theirs]).max())
        print(f"{name}: {times[name]:.3f} s, {rate:.0f} tokens/s, {peaks[name] / 1e9:.2f} GB;", end=" ")
        print(f"of theirs: tokens/s {times[theirs] / times[name]:.2f},", end=" ")
        print(f"memory {peaks[name] / peaks[theirs]:.2f}; losses differ by {difference:.1e}")
        results[name] = {
            "seconds": times[name],
            "tokens per second": rate,
            "peak memory": peaks[name],
            "largest difference of the losses": difference,
        }
    print(f"the products alone: {products:.3f} s")
    save_results(__file__, results)


if __name__ == "__main__":
    main()
