"""Why the shared blocks of a small Zamba2 drown its hybrid layers, and which recipe keeps all of its parts at work.

`python experiments/health/run.py` runs both parts of the experiment that README.md beside this file describes, and
writes results.json and figure.png; `--quick` runs both in a minute, on a smaller model, to see that they run.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from zamba2_jax import Zamba2, Zamba2Config, capture, preset
from zamba2_jax.cli.demo import SILENCED
from zamba2_jax.data.batches import Batch, held_out
from zamba2_jax.data.corpus import TokenizedCorpus, tokenize_embedded_corpus
from zamba2_jax.data.synthetic import Copying, open_synthetic
from zamba2_jax.evaluate import necessity
from zamba2_jax.train import recipe
from zamba2_jax.train.loop import make_stages, train
from zamba2_jax.train.metrics import HEALTHY_RATIOS, HealthRecord, Record
from zamba2_jax.train.optimizer import AdamW, Muon, Optimizer, ParameterGroup
from zamba2_jax.train.patterns import scale_matrices
from zamba2_jax.train.schedule import Phase, learning_rate
from zamba2_jax.train.step import TrainState, compile_train_step, init_state

HERE = Path(__file__).parent
LENGTH, ROWS, RATE = 128, 4, 1e-2

INIT_SCALE = recipe.init_scale(preset("zamba2-nano"))
SLOWER = (ParameterGroup(match="shared.*", rate=0.4), ParameterGroup(match="calls.*", rate=0.4))
DELAYED = (
    ParameterGroup(match="*", delay_steps=150, delay_power=2.0),
    ParameterGroup(match="embed", delay_steps=0),
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs between the runs."""

    optimizer: Optimizer
    init_scale: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rate: float = RATE
    curriculum: bool = True


COLLAPSE = {
    "AdamW 1e-2": Variant(AdamW()),
    "AdamW 2e-3": Variant(AdamW(), rate=2e-3),
    "AdamW, matrices delayed": Variant(AdamW(groups=DELAYED)),
    "AdamW, shared x 0.2": Variant(
        AdamW(groups=(ParameterGroup(match="shared.*", rate=0.2), ParameterGroup(match="calls.*", rate=0.2)))
    ),
    "AdamW, embedding x 20": Variant(AdamW(), {"embed": 20.0}),
    "Muon 1e-2": Variant(Muon()),
    "Muon, shared x 0.4": Variant(Muon(groups=SLOWER)),
}
"""Part 1: trained on code alone."""

RECIPES = {
    "the recipe": Variant(Muon(groups=SLOWER), INIT_SCALE),
    "no scaled initialisation": Variant(Muon(groups=SLOWER)),
    "one rate for all": Variant(Muon(), INIT_SCALE),
    "AdamW in place of Muon": Variant(AdamW(groups=SLOWER), INIT_SCALE),
    "copying not first": Variant(Muon(groups=SLOWER), INIT_SCALE, curriculum=False),
}
"""Part 2: each without one thing that the recipe of `zamba2 demo` has."""


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, a smaller model, one seed, two variants each")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each variant")
    parser.add_argument("--part", choices=["collapse", "recipes"], help="one part alone; the other's results are kept")
    parser.add_argument("--output", type=Path, default=HERE, help="directory for results.json and figure.png")
    options = parser.parse_args()
    if options.seeds < 1 or not options.output.is_dir():
        parser.error(f"--seeds {options.seeds} --output {options.output}: expected a number >= 1 and a directory")

    config, seeds = preset("zamba2-nano"), range(options.seeds)
    collapse, recipes, early, steps = COLLAPSE, RECIPES, 120, (200, 60, 140)
    if options.quick:
        config = dataclasses.replace(config, vocab_size=512, hidden_size=32, mamba_heads=2, num_layers=3,
                                     hybrid_layer_ids=(1, 2), ffn_size=48, d_state=8)  # fmt: skip
        collapse, recipes = (dict(list(variants.items())[:2]) for variants in (COLLAPSE, RECIPES))
        seeds, early, steps = range(1), 12, (6, 6, 6)
    corpus = tokenize_embedded_corpus(config.vocab_size)
    done = options.output / "results.json"
    results: dict[str, Any] = {"collapse": {}, "recipes": {}}
    if options.part and done.exists():
        results |= json.loads(done.read_text(encoding="utf-8"))
    for name, variant in collapse.items() if options.part != "recipes" else ():
        results["collapse"][name] = [collapse_run(config, corpus, variant, early, seed) for seed in seeds]
        print(name, [max(run["ratio"][-1]) for run in results["collapse"][name]], flush=True)
    for name, variant in recipes.items() if options.part != "collapse" else ():
        results["recipes"][name] = [recipe_run(config, corpus, variant, steps, seed) for seed in seeds]
        print(name, json.dumps(results["recipes"][name][0]), flush=True)
    done.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(results, options.output / "figure.png")
    print(table(results))


def collapse_run(
    config: Zamba2Config, corpus: TokenizedCorpus, variant: Variant, steps: int, seed: int
) -> dict[str, Any]:
    """A run on code, looked at as it goes.

    Returns:
        By step: rms(shared output) / rms(residual) of each call; of each hybrid mixer's output on held-out code, the
        share that is the same for every token, |mean|^2 / mean |.|^2; rms(embedding) / rms(residual after layer 0).
    """
    phase = Phase(name="code", steps=steps, shares={"code": 1.0}, warmup_steps=steps // 5, decay="constant")
    batch = held_out(corpus.held_out["code"], batch_size=4, length=LENGTH)[0]
    looks: list[dict[str, Any]] = []

    def look(state: TrainState, taken: int, position: object) -> bool:
        del position
        if taken in (1, 5, 10, 20, 40, 80, steps):
            looks.append({"step": taken, **jax.tree.map(float, _look(state.model, batch))})
        return False

    records, _ = _trained(config, corpus, variant, [phase], seed, health_every=2, after_step=look)
    health = [record for record in records if isinstance(record, HealthRecord)]
    return {
        "steps": [record.step for record in health],
        "ratio": [[call.ratio for call in record.calls.values()] for record in health],
        "looks": looks,
    }


@jax.jit
def _look(model: Zamba2, batch: Batch) -> dict[str, Any]:
    wanted = ("embed", "layers.0.output", "layers.*.mamba.output")
    taps = capture(model, jnp.asarray(batch.tokens), segment_ids=jnp.asarray(batch.segment_ids), select=wanted).values

    def constant(layer: int) -> jax.Array:
        output = taps[f"layers.{layer}.mamba.output"].reshape(-1, model.config.hidden_size)
        return jnp.sum(output.mean(0) ** 2) / jnp.mean(jnp.sum(output**2, axis=1))

    rms = {name: jnp.sqrt(jnp.mean(taps[name] ** 2)) for name in ("embed", "layers.0.output")}
    return {
        "constant": [constant(layer) for layer in model.config.hybrid_layer_ids],
        "embedding": rms["embed"] / rms["layers.0.output"],
    }


def recipe_run(
    config: Zamba2Config, corpus: TokenizedCorpus, variant: Variant, steps: tuple[int, int, int], seed: int
) -> dict[str, Any]:
    """A run of three phases, as in `zamba2 demo`, and what the model needs afterwards.

    Returns:
        By held-out text: the loss, the accuracy, and both with a part silenced; and the ratios of the last health.
    """
    copying, *text = steps
    # Without the curriculum the same rows of copying are spread over the whole run.
    share = 0.05 if variant.curriculum else (copying + 0.05 * sum(text)) / sum(steps)
    phases = recipe.phases(steps, copying=share)
    if not variant.curriculum:
        phases[0] = dataclasses.replace(phases[0], shares=phases[1].shares)
    records, state = _trained(config, corpus, variant, phases, seed, health_every=20 if sum(steps) > 100 else 3)
    task = dataclasses.replace(_task(), lengths=(20, 60))
    texts = {**corpus.held_out, "copying": open_synthetic(task, corpus.tokenizer, vocab_size=config.vocab_size)}
    needed = {
        name: necessity(state.model, held_out(text, batch_size=16, length=LENGTH), select=SILENCED)
        for name, text in texts.items()
    }
    health = [record for record in records if isinstance(record, HealthRecord)][-1]
    return {
        "ratio": [call.ratio for call in health.calls.values()],
        **{name: found.as_dict() for name, found in needed.items()},
    }


def _task() -> Copying:
    return Copying(symbols=64, lengths=(3, 60), distinct=True)


def _trained(
    config: Zamba2Config,
    corpus: TokenizedCorpus,
    variant: Variant,
    phases: list[Phase],
    seed: int,
    *,
    health_every: int,
    **options: Any,
) -> tuple[list[Record], TrainState]:
    """A run from fresh weights, and what it reported."""
    sources = {**corpus.train, "copying": open_synthetic(_task(), corpus.tokenizer, vocab_size=config.vocab_size)}
    stages = make_stages(phases, sources, batch_size=ROWS, length=LENGTH, seed=seed)
    optimizer, schedule = variant.optimizer.transformation(), learning_rate(phases, variant.rate)
    state = init_state(scale_matrices(Zamba2(config, rngs=nnx.Rngs(seed)), variant.init_scale), optimizer)
    batch = next(iter(stages[0].batches))
    step = compile_train_step(state, batch, optimizer=optimizer, schedule=schedule, health_every=health_every)
    records: list[Record] = []
    state = train(
        state, step, stages, held_out={}, log_every=20, eval_every=10**9, report=records.append,
        health_every=health_every, **options,
    )  # fmt: skip
    return records, state


def mean_and_error(values: list[float]) -> str:
    """Mean and standard error over seeds."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{np.mean(values):.3f} ± {error:.3f}"


def table(results: dict[str, Any]) -> str:
    """Both parts in Markdown, means over seeds with their standard errors."""
    lines = ["| code alone | largest ratio at the end | constant share of the hybrid mixers, steps 5, 10, 40, last |"]
    lines.append("|---|---|---|")
    for name, runs in results["collapse"].items():
        ratio = mean_and_error([max(run["ratio"][-1]) for run in runs])
        looks = [{look["step"]: np.mean(look["constant"]) for look in run["looks"]} for run in runs]
        shares = (np.mean([look.get(step, math.nan) for look in looks]) for step in (5, 10, 40, max(looks[0])))
        lines.append(f"| {name} | {ratio} | {', '.join(f'{share:.2f}' for share in shares)} |")
    lines += ["", "| recipe | prose | ratios | attention on code | attention on copying | hybrid mixers on prose "]
    lines[-1] += "| copies, with and without attention |"
    lines.append("|---|---|---|---|---|---|---|")
    for name, runs in results["recipes"].items():
        cells = [
            mean_and_error([run["prose"]["loss"] for run in runs]),
            f"{min(min(run['ratio']) for run in runs):.2f} to {max(max(run['ratio']) for run in runs):.2f}",
            mean_and_error([run["code"]["silenced"]["all.attention"]["increase"] for run in runs]),
            mean_and_error([run["copying"]["silenced"]["all.attention"]["increase"] for run in runs]),
            mean_and_error([run["prose"]["silenced"]["hybrid.mixer"]["increase"] for run in runs]),
            mean_and_error([run["copying"]["accuracy"] for run in runs])
            + "; "
            + mean_and_error([run["copying"]["silenced"]["all.attention"]["accuracy"] for run in runs]),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Part 1: the largest ratio over the steps, a line a seed. Part 2: accuracy of copying, a dot a seed."""
    figure = Figure(figsize=(11, 4.5), dpi=130, layout="constrained")
    ratios, copies = figure.subplots(1, 2)
    for i, (name, runs) in enumerate(results["collapse"].items()):
        for k, run in enumerate(runs):
            largest = [max(calls) for calls in run["ratio"]]
            ratios.plot(run["steps"], largest, color=f"C{i}", linewidth=1, label=None if k else name)
    ratios.set(yscale="log", xlabel="step", ylabel="largest rms(shared output) / rms(residual)", title="Code alone")
    ratios.axhspan(*HEALTHY_RATIOS, color="#e7f2e7", zorder=0)
    ratios.legend(fontsize=7)
    names = list(results["recipes"])
    for place, name in enumerate(names):
        for run in results["recipes"][name]:
            copies.plot(run["copying"]["accuracy"], place, "o", color="#3a7d44")
            silenced = run["copying"]["silenced"]["all.attention"]["accuracy"]
            copies.plot(silenced, place, "o", color="#c44e2b", fillstyle="none")
    copies.set(xlim=(-0.03, 1.03), xlabel="symbols copied right; open: attention uniform", title="Recipes, 400 steps")
    copies.set_yticks(range(len(names)), names)
    copies.invert_yaxis()
    figure.savefig(path)


if __name__ == "__main__":
    main()
