"""How the parameters of a model lie in the tensors of a Hugging Face checkpoint.

A published tensor holds one parameter, or several stacked along its rows or its columns, or whose rows alternate. The
rows of a matrix are outputs there as here. Each family has one table of them, for reading and for writing.
"""

from collections.abc import Sequence
from enum import Enum
from itertools import accumulate
from typing import NamedTuple

import numpy as np


class Form(Enum):
    """How a parameter and its part of a tensor relate."""

    SAME = "same"
    """All but taps: as they are."""
    CONV = "conv"
    """Depthwise taps: [taps, channels] here, [channels, 1, taps] there."""
    HEAD_ROWS = "head_rows"
    """Rows of several heads: [heads * rows, ...] here, [heads, rows, ...] there."""
    HEAD_COLUMNS = "head_columns"
    """Columns of several heads: [rows, heads * columns] here, [heads, rows, columns] there."""
    VECTOR = "vector"
    """A vector here, of any shape there."""

    def to_hf(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A parameter, or for the first two forms a slice of one, as its part of a tensor of that shape."""
        match self:
            case Form.SAME:
                return array
            case Form.CONV:
                return array.T[:, None, :]
            case Form.HEAD_COLUMNS:
                heads, rows, columns = shape
                return array.reshape(rows, heads, columns).swapaxes(0, 1)
        return array.reshape(shape)

    def from_hf(self, part: np.ndarray) -> np.ndarray:
        """A part of a tensor as a parameter."""
        match self:
            case Form.CONV:
                return part[:, 0, :].T
            case Form.HEAD_ROWS:
                return part.reshape(-1, *part.shape[2:])
            case Form.HEAD_COLUMNS:
                return part.swapaxes(0, 1).reshape(part.shape[1], -1)
            case Form.VECTOR:
                return part.reshape(-1)
        return part

    def part_index(self, index: tuple[slice, ...]) -> tuple[slice, ...] | None:
        """The index into the part of a tensor that selects what `index` selects of the parameter; None for no such."""
        if self is Form.SAME:
            return index
        if self is not Form.CONV:
            return None
        taps, channels = index
        return channels, slice(None), taps


class Part(NamedTuple):
    """Rows or columns of a tensor that are one parameter.

    Attributes:
        path: of the parameter in the model, as in `model.layers[3].mamba.in_z`: "layers.3.mamba.in_z".
        size: how many.
    """

    path: str
    size: int


class Tensor(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
        name: in the current layout.
        aliases: its names in older layouts.
        shape: of the whole tensor.
        parts: what is stacked along `axis`, in order; none in an empty tensor.
        axis: 0 for rows, 1 for columns.
        form: how its parameters are laid out.
        copies: names under which files may hold the same values again: the head of a tied model, and a shared block
            at the later layers that call it. transformers 5 shares blocks only where it ties the head too, so a file
            of an untied model has the copies.
        alternate: the rows of the parts, all of one size, take turns, and do not stand one part below the other.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    axis: int = 0
    form: Form = Form.SAME
    copies: tuple[str, ...] = ()
    alternate: bool = False

    def places(self) -> list[range]:
        """Which rows, or columns, of the tensor each part is."""
        if self.alternate:
            return [range(i, self.shape[0], len(self.parts)) for i in range(len(self.parts))]
        ends = list(accumulate(part.size for part in self.parts))
        return [range(end - part.size, end) for end, part in zip(ends, self.parts, strict=True)]

    def split(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """The parameters in a tensor of this name, by path."""
        before = (slice(None),) * self.axis
        arrays = [array[(*before, slice(own.start, own.stop, own.step))] for own in self.places()]
        return {part.path: self.form.from_hf(own) for part, own in zip(self.parts, arrays, strict=True)}

    def join(self, parameters: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor of these parameters, which are in the order of `parts`."""
        if not self.parts:
            return np.zeros(self.shape, np.float32)
        arrays = [self.form.to_hf(parameter, self.shape) for parameter in parameters]
        if self.alternate:
            return np.stack(arrays, axis=1).reshape(self.shape)
        return np.concatenate(arrays, self.axis) if len(arrays) > 1 else arrays[0]
