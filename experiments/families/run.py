"""What a hybrid, Mamba2 and a transformer learn for the same FLOPs, each at its best learning rate; see README.md.

`python experiments/families/run.py` tunes the rates and trains all; with `--quick` two small models for a few steps, to
see that it runs. Finished runs in `--runs` are not trained again.
"""

import argparse
import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from zamba2_jax import fit, init_model, preset
from zamba2_jax.data.batches import held_out
from zamba2_jax.data.corpus import TokenizedCorpus, tokenize_embedded_corpus
from zamba2_jax.data.synthetic import Passkey, open_synthetic
from zamba2_jax.evaluate.score import score
from zamba2_jax.files import finite
from zamba2_jax.lab.protocols import lookup_run, passkey_run, text_run
from zamba2_jax.lab.result import Outcome, Result
from zamba2_jax.models.base import LanguageModel
from zamba2_jax.models.flops import count_parameters, forward_flops
from zamba2_jax.models.zamba2.config import Zamba2Config
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.nn.parameter import named_parameters, with_values
from zamba2_jax.train.config import RunConfig
from zamba2_jax.train.step import evaluate

HERE = Path(__file__).parent
LENGTH = 128
HYBRID, LARGE_STATE = "Zamba2", "Mamba2, state 64"
MODELS: dict[str, ModelConfig] = {
    HYBRID: preset("zamba2-nano", vocab_size=512, hidden_size=64, num_layers=4, hybrid_layer_ids=(1, 3),
                   num_shared_blocks=1, mamba_heads=4, d_state=16, ffn_size=128, adapter_rank=4),
    "Mamba2": preset("mamba2-nano", vocab_size=512, hidden_size=64, num_layers=9, mamba_heads=4, d_state=16),
    LARGE_STATE: preset("mamba2-nano", vocab_size=512, hidden_size=64, num_layers=6, mamba_heads=4, d_state=64),
    "transformer": preset("transformer-nano", vocab_size=512, hidden_size=80, num_layers=4, ffn_size=260),
}  # fmt: skip
PROTOCOLS: dict[str, tuple[Callable[..., RunConfig], int]] = {
    "lookup": (lookup_run, 800),
    "passkey": (passkey_run, 800),
    "text": (text_run, 400),
    "longer": (lookup_run, 1600),
}
LONGER_SEEDS = 3
"""Of the models that look up for longer."""
RATES = (2.5e-3, 5e-3, 1e-2, 2e-2)
TUNING_SEEDS = {"lookup": (100, 101), "text": (100,)}
"""For the protocols by which rates are chosen; passkeys are learned at that of looking up."""
NEEDED = ("all.*",)
PASSKEYS = (96, 256, 512)
"""Rows that end in a passkey's answer; models have been trained on up to 128."""
WINDOW, BUCKETS = 512, (64, 128, 256, 512)
"""Tokens of code that are read from the beginning of a file, and where parts of it end whose mean losses are taken."""


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two models, one rate, one seed, a few steps")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each model")
    parser.add_argument("--output", type=Path, default=HERE, help="directory for results.json and figure.png")
    parser.add_argument("--runs", type=Path, help="directory that keeps the runs, to go on from; none by default")
    options = parser.parse_args()
    if options.seeds < 1 or not options.output.is_dir():
        parser.error(f"--seeds {options.seeds} --output {options.output}: expected a number >= 1 and a directory")
    models, protocols, rates, seeds = MODELS, PROTOCOLS, RATES, range(options.seeds)
    if options.quick:
        models = {name: model.with_num_layers(2) for name, model in models.items() if name in (HYBRID, LARGE_STATE)}
        protocols = {name: (run, 4) for name, (run, _) in protocols.items()}
        rates, seeds = rates[:1], range(1)
    with tempfile.TemporaryDirectory() as scratch:
        runs = options.runs or Path(scratch)
        scans = {
            name: tune(participants(models, name), *protocols[name], rates, seeds_, runs / f"{name}-rates")
            for name, seeds_ in TUNING_SEEDS.items()
        }
        best = {name: {model: best_rate(losses) for model, losses in scan.items()} for name, scan in scans.items()}
        best["passkey"] = best["longer"] = best["lookup"]
        results = {}
        for name, (run, steps) in protocols.items():
            longer = name == "longer"
            results[name] = fit(
                {
                    model: run(config, steps=steps, learning_rate=best[name][model])
                    for model, config in participants(models, name).items()
                },
                seeds=seeds[:LONGER_SEEDS] if longer else seeds,
                baseline=None if longer else HYBRID,
                necessity=() if longer else NEEDED,
                directory=runs / name,
            )
        corpus = tokenize_embedded_corpus(512)
        values = {
            "models": {name: size(model) for name, model in models.items()},
            "rates": scans,
            "table": {name: result.table(metrics=("*",)).as_dicts() for name, result in results.items()},
            "runs": {name: by_seed(result) for name, result in results.items()},
            "passkeys": {
                outcome.name: passkey_accuracies(outcome.model(), corpus) for outcome in finished(results["passkey"])
            },
            "positions": {
                outcome.name: {
                    base: position_losses(model, corpus) for base, model in with_rotary_bases(outcome.model()).items()
                }
                for outcome in finished(results["text"])
            },
        }
    (options.output / "results.json").write_text(json.dumps(finite(values), indent=1) + "\n", encoding="utf-8")
    plot(values, list(models)).savefig(options.output / "figure.png")
    for result in results.values():
        print(result.table())


def participants(models: Mapping[str, ModelConfig], protocol: str) -> dict[str, ModelConfig]:
    """The models that take part: in looking up all, for longer two that had not learned it, else all but one Mamba2."""
    out = {"lookup": (), "longer": (HYBRID, "Mamba2")}.get(protocol, (LARGE_STATE,))
    return {name: model for name, model in models.items() if name not in out}


def size(model: ModelConfig) -> dict[str, int]:
    """Parameters, and FLOPs of a forward pass per token of a row of 128."""
    return {"parameters": sum(count_parameters(model).values()), "flops": forward_flops(model, LENGTH).total}


def tune(
    models: Mapping[str, ModelConfig],
    run: Callable[..., RunConfig],
    steps: int,
    rates: tuple[float, ...],
    seeds: tuple[int, ...],
    directory: Path,
) -> dict[str, dict[str, float]]:
    """For each model and rate the mean held-out loss over sources and seeds; infinite where a run diverged."""
    runs = {
        f"{name} at {rate:g}": run(model, steps=steps, learning_rate=rate)
        for name, model in models.items()
        for rate in rates
    }
    result = fit(runs, seeds=seeds, directory=directory)
    return {name: {f"{rate:g}": mean_loss(result[f"{name} at {rate:g}"]) for rate in rates} for name in models}


def mean_loss(outcomes: tuple[Outcome, ...]) -> float:
    """Of all held-out sources, over seeds."""
    if any(outcome.status == "diverged" for outcome in outcomes):
        return math.inf
    return float(np.mean([v for outcome in outcomes for name, v in outcome.metrics.items() if name.endswith(".loss")]))


def best_rate(losses: Mapping[str, float]) -> float:
    """The rate of the smallest loss."""
    return float(min(losses, key=lambda rate: losses[rate]))


def finished(result: Result) -> list[Outcome]:
    """The runs that left a model."""
    return [outcome for outcome in result.outcomes if outcome.status == "finished"]


def by_seed(result: Result) -> dict[str, dict[str, Any]]:
    """Metrics of every run, and of its calls the last rms(shared output) / rms(residual)."""
    return {
        outcome.name: {
            **{name: round(value, 4) for name, value in outcome.metrics.items()},
            "ratios": [round(ratio, 3) for ratio in outcome.ratios()],
        }
        for outcome in result.outcomes
    }


def passkey_accuracies(model: LanguageModel, corpus: TokenizedCorpus) -> dict[str, float]:
    """The share of right tokens in the answers, by the tokens of a row."""
    found = {}
    for length in PASSKEYS:
        task = Passkey(digits=5, lengths=(length - 40, length - 18), held_out_rows=32)
        source = open_synthetic(task, corpus.tokenizer, vocab_size=model.config.vocab_size)
        found[str(length)] = round(evaluate(model, held_out(source, batch_size=8, length=length)).accuracy, 4)
    return found


def position_losses(model: LanguageModel, corpus: TokenizedCorpus) -> list[float]:
    """Mean losses over the parts of `BUCKETS`, in nats per token, of the beginnings of held-out files of code."""
    documents = corpus.held_out["code"]
    files = [documents[i][: WINDOW + 1] for i in range(len(documents))]
    losses = -np.stack(score(model, [file.tolist() for file in files if len(file) > WINDOW]))
    return [round(float(part.mean()), 4) for part in np.split(losses, BUCKETS[:-1], axis=1)]


def with_rotary_bases(model: LanguageModel) -> dict[str, LanguageModel]:
    """The model as it is and, if it has RoPE, with eight times the base and with that of Zamba2's long context."""
    config = model.config
    configs = {"as trained": config}
    if hasattr(config, "rope_theta"):
        configs["8 x base"] = dataclasses.replace(config, rope_theta=8 * config.rope_theta)
    if isinstance(config, Zamba2Config):
        configs["long context"] = config.with_long_context()
    values = {name: leaf[...] for name, leaf in named_parameters(model).items()}

    def build(config: ModelConfig) -> LanguageModel:
        return with_values(jax.eval_shape(lambda: init_model(config, rngs=nnx.Rngs(0))), values)

    return {name: build(changed) for name, changed in configs.items()}


def plot(values: Mapping[str, Any], models: list[str]) -> Figure:
    """What each model looks up, how far it finds passkeys, and its loss by position; dots are seeds."""
    figure = Figure(figsize=(13, 4), dpi=120, layout="constrained")
    axes = figure.subplots(1, 3)
    looked_up = values["runs"]["lookup"]
    tasks = [name for name in next(iter(looked_up.values())) if name.endswith(".accuracy")]
    found = {run: [of.get(task, np.nan) for task in tasks] for run, of in looked_up.items()}
    passkeys = {run: list(of.values()) for run, of in values["passkeys"].items()}
    positions = {run: of["as trained"] for run, of in values["positions"].items()}
    panels = (
        ("looked up right", [task.removesuffix(".accuracy") for task in tasks], found),
        ("passkeys right", [f"{n} tokens" for n in PASSKEYS], passkeys),
        ("loss on code, nats per token", [f"up to {end}" for end in BUCKETS], positions),
    )
    for axis, (label, names, runs) in zip(axes, panels, strict=True):
        for i, model in enumerate(models):
            found = np.array([of for run, of in runs.items() if run.rpartition("/")[0] == model])
            if len(found):
                places = np.arange(len(names)) + 0.08 * (i - len(models) / 2)
                axis.plot(places, np.nanmean(found, axis=0), color=f"C{i}", label=model, linewidth=1.2)
                axis.plot(places, found.T, ".", color=f"C{i}", alpha=0.5)
        axis.set_xticks(range(len(names)), names, fontsize=8)
        axis.set(ylabel=label)
        axis.grid(axis="y", linewidth=0.4)
    axes[0].legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
