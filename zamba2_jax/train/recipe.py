"""The recipe by which `zamba2 demo` and the notebooks train, and which experiments/nano.toml writes out.

Three phases: copying, from which attention learns to look things up; code; and, as the rate falls, prose with some of
both. experiments/health says what each piece of it is worth. There is no JAX here until it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from zamba2_jax.choices import Decay

if TYPE_CHECKING:
    from zamba2_jax.nn.config import ModelConfig
    from zamba2_jax.train.config import RunConfig
    from zamba2_jax.train.optimizer import Muon
    from zamba2_jax.train.schedule import Phase

STEPS = (240, 240, 840)
"""Of copying, of pretraining and of annealing."""
LEARNING_RATE = 1e-2
"""Its peak, in copying; pretraining begins at half of it, annealing warms up to three quarters."""
DECAY: Decay = "linear"
"""How it falls in annealing."""
REPLAY = 0.3
"""Share of code in annealing."""
COPYING = 0.05
"""Share of copying in pretraining and annealing."""

_INIT_SCALE = {
    "embed": 3.0,
    "layers.*.mamba.out": 0.3,
    "layers.*.attention.o": 0.3,
    "layers.*.mlp.down": 0.3,
    "shared.*.attention.o": 1.5,
    "shared.*.mlp.*": 1.5,
    "calls.*.linear": 1.5,
}
"""Factors of the initial matrices. The embedding is then not small beside what the layers add to the stream, so that
attention sees the token it stands at, and the shared blocks' output is not small beside the stream from the start."""
_RATES = {"shared.*": 0.4, "calls.*": 0.4}
"""Factors of the learning rate: slower on all that a shared block's output is made by."""


def init_scale(config: ModelConfig) -> dict[str, float]:
    """Factors of the initial matrices of such a model, by their names; see `train.patterns.scale_matrices`."""
    return _fitting(_INIT_SCALE, config)


def optimizer(config: ModelConfig) -> Muon:
    """Muon, slower on what belongs to shared blocks, if the model has any."""
    from zamba2_jax.train.optimizer import Muon, ParameterGroup

    rates = _fitting(_RATES, config)
    return Muon(groups=tuple(ParameterGroup(match=pattern, rate=rate) for pattern, rate in rates.items()))


def _fitting(values: Mapping[str, float], config: ModelConfig) -> dict[str, float]:
    """The values whose patterns fit a parameter of such a model."""
    import jax
    from flax import nnx

    from zamba2_jax.models.registry import init_model
    from zamba2_jax.nn.parameter import named_parameters
    from zamba2_jax.train.patterns import matches

    names = named_parameters(jax.eval_shape(lambda: init_model(config, rngs=nnx.Rngs(0))))
    return {pattern: value for pattern, value in values.items() if any(matches(name, pattern) for name in names)}


def phases(
    steps: Sequence[int] = STEPS, *, decay: Decay = DECAY, replay: float = REPLAY, copying: float = COPYING
) -> list[Phase]:
    """What is trained on, and at which rates: sources are "copying", "code" and "prose".

    Args:
        steps: of the three phases.
        decay, replay, copying: as `DECAY`, `REPLAY` and `COPYING`.
    """
    from zamba2_jax.train.schedule import Phase

    first, pretraining, annealing = steps
    text = 1 - copying
    return [
        Phase(
            name="copying",
            steps=first,
            shares={"copying": 1.0},
            warmup_steps=first // 10,
            decay="linear",
            final_fraction=0.5,
        ),
        Phase(
            name="pretraining",
            steps=pretraining,
            shares={"code": text, "copying": copying},
            peak_fraction=0.5,
            decay="cosine",
            final_fraction=0.2,
        ),
        Phase(
            name="annealing",
            steps=annealing,
            shares={
                "prose": text * (1 - replay),
                "code": text * replay,
                "copying": copying,
            },
            warmup_steps=annealing // 20,
            peak_fraction=0.75,
            decay=decay,
            final_fraction=0.01,
        ),
    ]


def run_config(
    model: ModelConfig,
    *,
    steps: Sequence[int] = STEPS,
    batch_size: int = 4,
    length: int = 128,
    learning_rate: float = LEARNING_RATE,
    directory: str = "runs/recipe",
) -> RunConfig:
    """The run that trains an architecture by the recipe, on the embedded corpus.

    What the recipe says of parameters that the architecture does not have, such as shared blocks, is left out.

    Args:
        model: the architecture.
        steps: of the three phases.
        batch_size: rows of a step.
        length: tokens of a row.
        learning_rate: the peak.
        directory: of the run.

    Raises:
        ValueError: a value breaks a rule of `RunConfig`.
    """
    import dataclasses

    from zamba2_jax.data.sources import SourceConfig
    from zamba2_jax.data.synthetic import Copying
    from zamba2_jax.train.config import EMBEDDED_TOKENIZER, EvaluationConfig, LoggingConfig, ModelSource, RunConfig

    # A row holds the longest string twice, with a marker between, BOS and EOS.
    longest = min(60, (length - 3) // 2)
    copying = Copying(symbols=64, lengths=(min(3, longest), longest), distinct=True)
    return RunConfig(
        directory=directory,
        model=ModelSource(architecture={"model_type": model.model_type, **dataclasses.asdict(model)}),
        tokenizer=EMBEDDED_TOKENIZER,
        sources={"code": SourceConfig(kind="code"), "prose": SourceConfig(kind="prose"), "copying": copying},
        phases=tuple(phases(steps)),
        learning_rate=learning_rate,
        batch_size=batch_size,
        length=length,
        optimizer=optimizer(model),
        init_scale=init_scale(model),
        evaluation=EvaluationConfig(
            every=125,
            sources={
                "prose": SourceConfig(kind="held_out_prose"),
                "code": SourceConfig(kind="held_out_code"),
                "copying": dataclasses.replace(copying, lengths=(-(-longest // 3), longest)),
            },
        ),
        logging=LoggingConfig(every=5),
    )
