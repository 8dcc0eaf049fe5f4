"""Names of parameters by pattern, for what a run's config gives to groups of them."""

import difflib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase


def matches(name: str, pattern: str) -> bool:
    """Whether a parameter's name, as `model.parameter.named_parameters` gives it, fits a pattern.

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


def _candidates(names: Iterable[str]) -> list[str]:
    """Patterns for names, without the numbers of layers, and for all that begin or end like them."""
    found: dict[str, None] = {}
    for name in names:
        parts = re.sub(r"\b\d+\b", "*", name).split(".")
        begins = [".".join(parts[:length]) for length in range(1, len(parts)) if parts[length - 1] != "*"]
        found |= dict.fromkeys([".".join(parts), *(f"{begin}.*" for begin in begins)])
        found |= dict.fromkeys([f"*.{parts[-1]}"] if begins else [])
    return list(found)
