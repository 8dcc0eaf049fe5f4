"""The learning rate over a run of several phases; phases are data."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import get_args

import jax.numpy as jnp
import optax

from zamba2_jax.choices import Decay


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of a training run: a learning-rate curve and what is trained on.

    At step s of the phase the rate is `peak * s / warmup_steps` during the warm-up, then falls from the peak to
    `final_fraction * peak`, which it would reach at step `steps`.

    Attributes:
        name: for people.
        steps: optimizer steps.
        shares: of the rows, how much each source gives; they sum to 1.
        warmup_steps: steps of the linear rise from 0.
        peak_fraction: the peak, as a fraction of the run's peak rate.
        decay: shape of the fall; "constant" does not fall, "1-sqrt" falls by the square root of the time
            (arXiv:2405.18392).
        final_fraction: where the fall ends, as a fraction of the phase's peak.

    Raises:
        ValueError: a value breaks a rule; the message names field, value and rule.
    """

    name: str
    steps: int
    shares: Mapping[str, float]
    warmup_steps: int = 0
    peak_fraction: float = 1.0
    decay: Decay = "cosine"
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        def require(valid: bool, field: str, rule: str) -> None:
            if not valid:
                raise ValueError(f"phase {self.name!r}: {field}={getattr(self, field)!r}: expected {rule}")

        require(isinstance(self.steps, int) and self.steps >= 1, "steps", "an integer >= 1")
        warms_up = isinstance(self.warmup_steps, int) and 0 <= self.warmup_steps < self.steps
        require(warms_up, "warmup_steps", f"an integer in [0, steps={self.steps})")
        require(0 < self.peak_fraction < math.inf, "peak_fraction", "a finite number > 0")
        require(self.decay in get_args(Decay), "decay", f"one of {', '.join(get_args(Decay))}")
        require(0 <= self.final_fraction <= 1, "final_fraction", "a number in [0, 1]")
        exponential = self.decay == "exponential"
        require(not exponential or self.final_fraction > 0, "final_fraction", "more than 0 with exponential decay")
        shares = list(self.shares.values())
        require(bool(shares) and min(shares) >= 0, "shares", "at least one, none negative")
        require(math.isclose(sum(shares), 1, abs_tol=1e-6), "shares", f"a sum of 1, not {sum(shares)}")


def learning_rate(phases: Sequence[Phase], peak: float) -> optax.Schedule:
    """The learning rate as a pure function of the step, counted from 0 over all phases.

    Past the last step it stays where the last phase ends.

    Raises:
        ValueError: there is no phase, two have one name, or `peak` is not a finite number > 0.
    """
    names = [phase.name for phase in phases]
    if not names:
        raise ValueError("phases is empty, expected at least one")
    if len(set(names)) < len(names):
        raise ValueError(f"phases are named {names}: expected distinct names")
    if not 0 < peak < math.inf:
        raise ValueError(f"peak learning rate={peak}: expected a finite number > 0")
    curves = [_curve(phase, peak * phase.peak_fraction) for phase in phases]
    return optax.join_schedules(curves, boundaries(phases)[:-1])


def boundaries(phases: Sequence[Phase]) -> list[int]:
    """The step at which each phase ends, exclusive."""
    ends = [0]
    for phase in phases:
        ends.append(ends[-1] + phase.steps)
    return ends[1:]


def _curve(phase: Phase, peak: float) -> optax.Schedule:
    steps, final = phase.steps - phase.warmup_steps, phase.final_fraction
    decays = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, final * peak, steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps, alpha=final),
        "exponential": lambda: optax.exponential_decay(peak, steps, final, end_value=final * peak),
        "1-sqrt": lambda: _square_root_decay(peak, steps, final),
    }
    decay = decays[phase.decay]()
    if not phase.warmup_steps:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, phase.warmup_steps), decay], [phase.warmup_steps])


def _square_root_decay(peak: float, steps: int, final: float) -> optax.Schedule:
    return lambda step: peak * (1 - (1 - final) * jnp.sqrt(jnp.clip(step / steps, 0.0, 1.0)))
