"""AdamW with the decay mask of a Mamba model."""

import dataclasses
from typing import Any

import jax
import optax

from zamba2_jax.train.stacks import Stacks


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (arXiv:1711.05101) with clipping by global norm.

    Attributes:
        b1, b2: decay of the first and second moments.
        eps: added to the root of the second moment.
        weight_decay: per step and unit of learning rate, on the parameters of `decay_mask`.
        clip_norm: gradients with a larger global norm are scaled down to it.

    Raises:
        ValueError: a value breaks a rule; the message names field, value and rule.
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        rules = {
            "b1": (0 <= self.b1 < 1, "a number in [0, 1)"),
            "b2": (0 <= self.b2 < 1, "a number in [0, 1)"),
            "eps": (self.eps > 0, "a number > 0"),
            "weight_decay": (self.weight_decay >= 0, "a number >= 0"),
            "clip_norm": (self.clip_norm > 0, "a number > 0"),
        }
        for field, (valid, rule) in rules.items():
            if not valid:
                raise ValueError(f"{field}={getattr(self, field)!r}: expected {rule}")

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer for a learning rate of 1: what it returns is still to be scaled by minus the rate."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.scale_by_adam(self.b1, self.b2, self.eps),
            optax.add_decayed_weights(self.weight_decay, mask=decay_mask),
        )


def decay_mask(parameters: Any) -> Any:
    """True where weight decay applies: on matrices, not on vectors (norm scales, biases, A_log, D, dt_bias)."""
    if isinstance(parameters, Stacks):
        vectors, matrices = dict.fromkeys(parameters.vectors, False), dict.fromkeys(parameters.matrices, True)
        return Stacks(vectors, matrices, decay_mask(parameters.large))
    return jax.tree.map(lambda parameter: parameter.ndim > 1, parameters)
