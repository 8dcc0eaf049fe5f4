"""Names of parameters by pattern, for what a run's config gives to groups of them."""

import difflib
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from zamba2_jax.models.base import LanguageModel
from zamba2_jax.nn.parameter import named_parameters, with_values


def matches(name: str, pattern: str) -> bool:
    """Whether a parameter's name, as `nn.parameter.named_parameters` gives it, fits a pattern.

    Patterns are those of `fnmatch`: "*" stands for any text, dots too, "?" for one character, "[0-3]" for one of them.
    """
    return fnmatchcase(name, pattern)


def check_patterns(patterns: Iterable[tuple[str, str]], names: Iterable[str]) -> None:
    """Finds patterns that no name fits.

    Args:
        patterns: each with its place in the config, for the message.
        names: of all parameters.

    Raises:
        ValueError: there is one; the message names its place and what it is near to.
    """
    names = list(names)
    for place, pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, _candidates(names), n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"expected names like {names[0]!r}"
            raise ValueError(f"{place}={pattern!r} fits no parameter: {hint}")


def scale_matrices(model: LanguageModel, scales: Mapping[str, float]) -> LanguageModel:
    """The model with matrices multiplied by the factor of the last pattern that their names fit; vectors stay.

    Raises:
        ValueError: a pattern fits no parameter.
    """
    named = named_parameters(model)
    check_patterns(((f"init_scale.{pattern}", pattern) for pattern in scales), named)
    values = {}
    for name, parameter in named.items():
        factors = [factor for pattern, factor in scales.items() if matches(name, pattern)]
        value = parameter.get_value()
        values[name] = value * factors[-1] if factors and value.ndim > 1 else value
    return with_values(model, values)


def _candidates(names: Iterable[str]) -> list[str]:
    """Patterns for names, without the numbers of layers, and for all that begin or end like them."""
    found: dict[str, None] = {}
    for name in names:
        parts = re.sub(r"\b\d+\b", "*", name).split(".")
        begins = [".".join(parts[:length]) for length in range(1, len(parts)) if parts[length - 1] != "*"]
        found |= dict.fromkeys([".".join(parts), *(f"{begin}.*" for begin in begins)])
        found |= dict.fromkeys([f"*.{parts[-1]}"] if begins else [])
    return list(found)
