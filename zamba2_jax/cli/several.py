"""Options of several values, which may be given together, one by one, or both."""

from itertools import chain
from typing import Annotated, TypeVar

import tyro

T = TypeVar("T")

Several = Annotated[tuple[tuple[T, ...], ...], tyro.conf.UseAppendAction]
"""The values of an option, in a tuple for each time it is given: `--x a b --x c` is (("a", "b"), ("c",))."""


def values(option: tuple[tuple[T, ...], ...]) -> tuple[T, ...]:
    """All values of an option, in their order."""
    return tuple(chain.from_iterable(option))
