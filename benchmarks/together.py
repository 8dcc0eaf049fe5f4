"""Steps per second of eight seeds of zamba2-nano, trained together and one after the other.

`python benchmarks/together.py` takes turns between the ways, so that a busy machine slows all of them, and compares
rounds. `--vmap` adds the way of GPUs and TPUs, which takes minutes to compile on a CPU.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from common import machine, option_parser, save_results, use_cpu, use_large_pages

from zamba2_jax import preset
from zamba2_jax.data.batches import Batch
from zamba2_jax.lab.together import Program, Together, compile_group, make_groups
from zamba2_jax.lab.trials import Trial, make_trials
from zamba2_jax.train.recipe import run_config

SEEDS, STEPS = 8, 4


def take_steps(program: Program, trials: list[Trial], batch: Batch) -> Callable[[], None]:
    """What takes `STEPS` steps of all runs, in as many threads as the program has for them."""
    begun = {trial.name: program.begin(trial) for trial in trials}
    pool = ThreadPoolExecutor(program.workers)

    def run(trial: Trial) -> None:
        state, step = begun[trial.name]
        with jax.set_mesh(program.mesh):
            for _ in range(STEPS):
                state, metrics = step(state, batch)
            jax.block_until_ready(metrics.loss)
        begun[trial.name] = state, step

    return lambda: list(pool.map(run, trials)) and None


def main() -> None:
    """Prints the table and writes the numbers."""
    parser = option_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--vmap", action="store_true")
    options = parser.parse_args()
    use_cpu()
    use_large_pages()
    config = preset("zamba2-nano")
    trials = make_trials({"nano": run_config(config)}, range(SEEDS))
    (group,) = make_groups(trials, [config] * SEEDS)
    random = np.random.default_rng(0)
    tokens = random.integers(3, config.vocab_size, (4, 128), dtype=np.int32)
    batch = Batch(tokens=tokens, segment_ids=np.ones_like(tokens), weights=np.ones(tokens.shape, np.float32))
    ways: list[Together] = ["turn", "threads", *(["vmap"] if options.vmap else [])]
    calls = {}
    for way in ways:
        calls[way] = take_steps(compile_group(group, way), trials, batch)
        calls[way]()
    times: dict[str, list[float]] = {way: [] for way in ways}
    processor: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, call in calls.items():
            begin, begin_processor = time.perf_counter(), time.process_time()
            call()
            times[way].append(time.perf_counter() - begin)
            processor[way].append(time.process_time() - begin_processor)
    results: dict[str, object] = {"measured on": machine(), "seeds": SEEDS}
    for way in ways:
        ratios = [alone / together for alone, together in zip(times["turn"], times[way], strict=True)]
        rate = SEEDS * STEPS / statistics.median(times[way])
        results[way] = {
            "steps per second": rate,
            "of in turn": statistics.median(ratios),
            "CPU seconds per step": statistics.median(processor[way]) / SEEDS / STEPS,
        }
        print(f"{way}: {rate:.1f} steps/s, {statistics.median(ratios):.2f} times in turn", end=" ")
        print(
            f"(rounds {min(ratios):.2f} to {max(ratios):.2f}), {results[way]['CPU seconds per step'] * 1e3:.0f} ms CPU"
        )
    save_results(__file__, results)


if __name__ == "__main__":
    main()
