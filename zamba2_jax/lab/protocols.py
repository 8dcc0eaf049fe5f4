"""Three runs that ask what an architecture learns: to look things up, to find a passkey, and a language.

They are apart because they disturb each other: a phase of tasks leaves the loss on text above that of a new model, and
a passkey has few answers beside those of other tasks. All take the recipe's optimizer and initial scale, warm up for a
tenth of their steps and decay linearly to a hundredth; so the learning rate is all that is left to tune.
"""

import dataclasses
from collections.abc import Mapping

from zamba2_jax.data.sources import SourceConfig
from zamba2_jax.data.synthetic import AnySource, Copying, Passkey, Recall
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.train import recipe
from zamba2_jax.train.config import EvaluationConfig, LoggingConfig, RunConfig
from zamba2_jax.train.schedule import Phase

LOOKUP_LENGTH = 32
"""Tokens of the shortest row in which `lookup_run` has room for a few pairs."""


def lookup_run(
    model: ModelConfig, *, steps: int, learning_rate: float, batch_size: int = 8, length: int = 64
) -> RunConfig:
    """The run that learns copying (0.4 of the rows) and the recall of keys' values (0.6), and no text.

    Held out are strings of a third of the longest and more, as "copying"; and as "recall-N" examples of N pairs, for a
    quarter, half and all of the most pairs that there are in training.

    Args:
        model: the architecture.
        steps: of the optimizer.
        learning_rate: the peak.
        batch_size: rows of a step.
        length: tokens of a row; the longest string takes it all, the most pairs three quarters of it.

    Raises:
        ValueError: a value breaks a rule of `RunConfig`, or a row is too short.
    """
    if length < LOOKUP_LENGTH:
        raise ValueError(f"length={length}: expected at least {LOOKUP_LENGTH}, for a few pairs to find room")
    longest, pairs = (length - 4) // 2, 3 * length // 16
    copying = Copying(symbols=longest, lengths=(3, longest), distinct=True)
    recall = Recall(keys=2 * pairs, values=2 * pairs, pairs=(2, pairs))
    held_out: dict[str, AnySource] = {"copying": dataclasses.replace(copying, lengths=(longest // 3, longest))}
    for count in (pairs // 4, pairs // 2, pairs):
        held_out[f"recall-{count}"] = dataclasses.replace(recall, pairs=(count, count))
    base = recipe.run_config(model, batch_size=batch_size, length=length, learning_rate=learning_rate)
    return _with_sources(base, steps, {"copying": (copying, 0.4), "recall": (recall, 0.6)}, held_out)


def passkey_run(
    model: ModelConfig, *, steps: int, learning_rate: float, batch_size: int = 4, length: int = 128
) -> RunConfig:
    """The run that learns to find a number of five digits in filler text, of a few sentences at most.

    Args:
        model, steps, learning_rate, batch_size: as for `lookup_run`.
        length: tokens of a row.

    Raises:
        ValueError: a value breaks a rule of `RunConfig`, or a row is too short for statement and question.
    """
    passkey = Passkey(digits=5, lengths=(48, length - 18))  # an answer with its frame takes up to 18
    base = recipe.run_config(model, batch_size=batch_size, length=length, learning_rate=learning_rate)
    return _with_sources(base, steps, {"passkey": (passkey, 1.0)}, {"passkey": passkey})


def text_run(
    model: ModelConfig, *, steps: int, learning_rate: float, batch_size: int = 4, length: int = 128
) -> RunConfig:
    """The run that learns prose and code of the embedded corpus, half of the rows each; both are held out, too.

    Args:
        model, steps, learning_rate, batch_size: as for `lookup_run`.
        length: tokens of a row.

    Raises:
        ValueError: a value breaks a rule of `RunConfig`.
    """
    base = recipe.run_config(model, batch_size=batch_size, length=length, learning_rate=learning_rate)
    sources = {name: (SourceConfig(kind=name), 0.5) for name in ("prose", "code")}
    return _with_sources(base, steps, sources, {name: base.evaluation.sources[name] for name in sources})


def _with_sources(
    base: RunConfig,
    steps: int,
    sources: Mapping[str, tuple[AnySource, float]],
    held_out: Mapping[str, AnySource],
) -> RunConfig:
    """A run of one phase: sources with their shares of the rows."""
    shares = {name: share for name, (_, share) in sources.items()}
    phase = Phase(name="all", steps=steps, shares=shares, warmup_steps=steps // 10, decay="linear", final_fraction=0.01)
    return dataclasses.replace(
        base,
        sources={name: source for name, (source, _) in sources.items()},
        phases=(phase,),
        evaluation=EvaluationConfig(every=steps, sources=held_out),
        logging=LoggingConfig(every=max(1, steps // 50), health_every=max(1, steps // 5)),
    )
