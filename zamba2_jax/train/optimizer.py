"""Optimizers, with learning rates, delays and weight decay by groups of parameters."""

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zamba2_jax.parallel.mesh import ambient_mesh
from zamba2_jax.train.patterns import check_patterns, matches
from zamba2_jax.train.stacks import Leaf, leaves_of, parameter_names
from zamba2_jax.typing import Array, Float

NOT_ORTHOGONAL = ("embed", "head", "*.conv_*")
"""Arrays of two axes that are no matrices to `Muon`: tables by token, and taps of convolutions."""

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, x^3 and x^5 in an iteration of `Muon` (https://github.com/KellerJordan/modded-nanogpt)."""

HashableT = TypeVar("HashableT", bound=Hashable)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """What the parameters of a group have in place of the optimizer's own; None leaves it as it is.

    At step s, counted from 0, the learning rate of a parameter is that of the run times
    rate * min(1, s / delay_steps) ** delay_power.

    Attributes:
        match: which parameters: a pattern of their names; see `train.patterns`.
        rate: factor of the learning rate.
        delay_steps: steps until the factor is reached; 0 for at once.
        delay_power: how the factor rises.
        weight_decay: in place of the optimizer's, on the matrices of the group.

    Raises:
        ValueError: a value breaks a rule; the message names field, value and rule.
    """

    match: str
    rate: float | None = None
    delay_steps: int | None = None
    delay_power: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        not_negative = "a finite number >= 0"
        _check(
            self,
            match=(bool(self.match), "a pattern"),
            rate=(_is_none_or(self.rate, 0), not_negative),
            delay_steps=(_is_none_or(self.delay_steps, 0), "an integer >= 0"),
            delay_power=(_is_none_or(self.delay_power, 0) and self.delay_power != 0, "a finite number > 0"),
            weight_decay=(_is_none_or(self.weight_decay, 0), not_negative),
        )


class Settings(NamedTuple):
    """What groups come to for one parameter; the fields of `ParameterGroup`."""

    rate: float
    delay_steps: int
    delay_power: float
    weight_decay: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What the optimizers have in common.

    Attributes:
        b1, b2: decay of Adam's first and second moments.
        eps: added to the root of the second moment.
        weight_decay: per step and unit of learning rate, on matrices; vectors (norm scales, biases, A_log, D, dt_bias)
            never decay.
        clip_norm: gradients with a larger global norm are scaled down to it.
        groups: of each field of a parameter the last group counts that it is in and that gives the field.

    Raises:
        ValueError: a value breaks a rule; the message names field, value and rule.
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    groups: tuple[ParameterGroup, ...] = ()

    def __post_init__(self) -> None:
        _check(
            self,
            b1=(0 <= self.b1 < 1, "a number in [0, 1)"),
            b2=(0 <= self.b2 < 1, "a number in [0, 1)"),
            eps=(self.eps > 0, "a number > 0"),
            weight_decay=(self.weight_decay >= 0, "a number >= 0"),
            clip_norm=(self.clip_norm > 0, "a number > 0"),
        )

    def settings(self, name: str) -> Settings:
        """What the groups come to for the parameter of this name."""
        found = {"rate": 1.0, "delay_steps": 0, "delay_power": 1.0, "weight_decay": self.weight_decay}
        for group in self.groups:
            if matches(name, group.match):
                found |= {key: value for key in found if (value := getattr(group, key)) is not None}
        return Settings(**found)  # type: ignore[arg-type]

    def check(self, names: Iterable[str]) -> None:
        """Finds groups that none of the parameters of these names is in.

        Raises:
            ValueError: there is one; the message lists names that are near.
        """
        patterns = [(f"optimizer.groups.{i}.match", group.match) for i, group in enumerate(self.groups)]
        check_patterns(patterns, names)

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer for a learning rate of 1: what it returns is still to be scaled by minus the rate.

        It takes a model's parameters, or their `Stacks`. With groups `update` takes the step, counted from 0, as the
        argument `step`, and `init` raises a ValueError as `check` does.
        """
        parts = [optax.clip_by_global_norm(self.clip_norm), self._direction(), _decayed(self)]
        chain = optax.chain(*parts, *([_scaled(self)] if self.groups else []))

        def init(parameters: Any) -> optax.OptState:
            self.check(parameter_names(parameters))
            return chain.init(parameters)

        return optax.GradientTransformationExtraArgs(init, optax.with_extra_args_support(chain).update)

    def _direction(self) -> optax.GradientTransformation:
        """From the gradient to the update, without weight decay."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """AdamW (arXiv:1711.05101) with clipping by global norm; other fields as in `Optimizer`."""

    kind: Literal["adamw"] = "adamw"

    def _direction(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Muon for matrices, Adam for the rest, both with weight decay; other fields as in `Optimizer`.

    The update of a matrix is its momentum with all singular values brought near 1 by Newton-Schulz steps
    (https://github.com/KellerJordan/modded-nanogpt), times rms * sqrt(max(rows, columns)). So its root mean square is
    about `rms`, as that of Adam's updates is about 0.2, and one learning rate serves both (arXiv:2502.16982, section
    2.2). Matrices are those of mixers, shared blocks, adapters and the linear maps after the blocks; embedding, head,
    taps of convolutions and vectors take Adam.

    Attributes:
        momentum: decay of the mean gradient of a matrix.
        nesterov: whether the update looks ahead by one step of the momentum.
        newton_schulz_steps: iterations per update.
        rms: root mean square of the update of a matrix.
    """

    kind: Literal["muon"] = "muon"
    momentum: float = 0.95
    nesterov: bool = True
    newton_schulz_steps: int = 5
    rms: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(
            self,
            momentum=(0 <= self.momentum < 1, "a number in [0, 1)"),
            newton_schulz_steps=(self.newton_schulz_steps >= 1, "an integer >= 1"),
            rms=(0 < self.rms < math.inf, "a finite number > 0"),
        )

    def _direction(self) -> optax.GradientTransformation:
        muon = optax.chain(
            optax.trace(self.momentum, nesterov=self.nesterov),
            optax.stateless(lambda updates, _: _orthogonalized(updates, self.newton_schulz_steps, self.rms)),
        )
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps)
        return optax.partition({"muon": muon, "adam": adam}, _labels)


def decay_mask(parameters: Any) -> Any:
    """True where weight decay applies: on matrices, not on vectors (norm scales, biases, A_log, D, dt_bias)."""
    return jax.tree.map(lambda parameter, leaf: _own_ndim(parameter, leaf) > 1, parameters, leaves_of(parameters))


def _labels(parameters: Any) -> Any:
    """Which of the two optimizers of `Muon` each parameter takes; all that are stacked together the same one."""

    def label(parameter: Array, leaf: Leaf) -> str:
        table = any(matches(leaf.names[0], pattern) for pattern in NOT_ORTHOGONAL)
        return "muon" if _own_ndim(parameter, leaf) == 2 and not table else "adam"

    return jax.tree.map(label, parameters, leaves_of(parameters))


def newton_schulz(x: Float[Array, "s m n"], steps: int) -> Float[Array, "s m n"]:
    """Each matrix with its singular values brought into about 0.7 to 1.2, its singular vectors kept.

    An iteration is a x + b (x x^T) x + c (x x^T)^2 x, on the matrix over its Frobenius norm.
    """
    a, b, c = NEWTON_SCHULZ
    if wide := x.shape[1] <= x.shape[2]:
        x = x.swapaxes(1, 2)
    x /= jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-8
    for _ in range(steps):
        gram = x.swapaxes(1, 2) @ x
        x = a * x + x @ (b * gram + c * gram @ gram)
    return x.swapaxes(1, 2) if wide else x


def _orthogonalized(updates: Any, steps: int, rms: float) -> Any:
    """Matrices [out, in], or stacks of such, with their singular values near 1, times rms * sqrt(max(out, in)).

    On one device all matrices of one shape are one stack: a model has hundreds of matrices and a dozen shapes, and what
    the steps take to compile goes with the number of stacks. A mesh may divide matrices of one shape differently.
    """
    leaves, structure = jax.tree.flatten(updates)
    stacks: dict[Hashable, list[int]] = {}
    for place, leaf in enumerate(leaves):
        alike = (leaf.shape[-2:], leaf.dtype) if ambient_mesh() is None else place
        stacks.setdefault(alike, []).append(place)
    for places in stacks.values():
        parts = [leaves[place].reshape(-1, *leaves[place].shape[-2:]) for place in places]
        stack = newton_schulz(jnp.concatenate(parts), steps)
        stack *= rms * math.sqrt(max(stack.shape[1:]))
        for place, part in zip(places, jnp.split(stack, np.cumsum([len(part) for part in parts])[:-1]), strict=True):
            leaves[place] = part.reshape(leaves[place].shape)
    return jax.tree.unflatten(structure, leaves)


def _decayed(optimizer: Optimizer) -> optax.GradientTransformation:
    """Adds the weight decay of each parameter."""

    def update(updates: Any, state: optax.OptState, parameters: Any = None) -> tuple[Any, optax.OptState]:
        def add(update: Array, parameter: Array, leaf: Leaf) -> Array:
            decays = _for_each(leaf, lambda name: optimizer.settings(name).weight_decay)
            if _own_ndim(parameter, leaf) < 2 or not any(decays):
                return update
            return update + _spread(decays, update, float) * parameter

        return jax.tree.map(add, updates, parameters, leaves_of(updates)), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _scaled(optimizer: Optimizer) -> optax.GradientTransformationExtraArgs:
    """Scales the update of each parameter by its factor at a step."""

    def update(
        updates: Any, state: optax.OptState, parameters: Any = None, *, step: Array, **extra: Any
    ) -> tuple[Any, optax.OptState]:
        del parameters, extra

        def factor(settings: Settings) -> float | Array:
            if not settings.delay_steps:
                return settings.rate
            risen = jnp.minimum(1.0, jnp.asarray(step) / settings.delay_steps)
            return settings.rate * risen**settings.delay_power

        def scale(update: Array, leaf: Leaf) -> Array:
            factors = _for_each(leaf, lambda name: optimizer.settings(name)._replace(weight_decay=0.0))
            if set(factors) == {Settings(1.0, 0, 1.0, 0.0)}:
                return update
            return update * _spread(factors, update, factor)

        return jax.tree.map(scale, updates, leaves_of(updates)), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _own_ndim(parameter: Array, leaf: Leaf) -> int:
    """The axes of a parameter, stacked or not."""
    return parameter.ndim - leaf.stacked


def _for_each(leaf: Leaf, function: Callable[[str], HashableT]) -> list[HashableT]:
    return [function(name) for name in leaf.names]


def _spread(values: list[HashableT], like: Array, function: Callable[[HashableT], float | Array]) -> float | Array:
    """One number for each parameter in an array, in its shape but for axes of 1; a single number if all are equal."""
    if len(set(values)) == 1:
        number = function(values[0])
        return number if isinstance(number, float) else number.astype(like.dtype)
    numbers = {value: jnp.asarray(function(value), like.dtype) for value in set(values)}
    return jnp.stack([numbers[value] for value in values]).reshape(-1, *[1] * (like.ndim - 1))


def _is_none_or(value: float | None, low: float) -> bool:
    return value is None or low <= value < math.inf


def _check(config: Any, **rules: tuple[bool, str]) -> None:
    for field, (valid, rule) in rules.items():
        if not valid:
            raise ValueError(f"{field}={getattr(config, field)!r}: expected {rule}")
