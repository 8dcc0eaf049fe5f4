"""How the parameters of a model lie in the tensors of a Hugging Face checkpoint.

A published tensor holds one parameter, or several stacked along its rows or its columns. The rows of a matrix are
outputs there as here. Each family has one table of them, for reading and for writing.
"""

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import numpy as np


class Form(Enum):
    """How a parameter and its part of a tensor relate."""

    SAME = "same"
    """All but taps: as they are."""
    CONV = "conv"
    """Depthwise taps: [taps, channels] here, [channels, 1, taps] there."""

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """A parameter as its part of the tensor."""
        return array if self is Form.SAME else array.T[:, None, :]

    def from_hf(self, part: np.ndarray) -> np.ndarray:
        """A part of a tensor as a parameter."""
        return part if self is Form.SAME else part[:, 0, :].T

    def part_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """The index into the part of a tensor that selects what `index` selects of the parameter."""
        if self is Form.SAME:
            return index
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
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    axis: int = 0
    form: Form = Form.SAME
    copies: tuple[str, ...] = ()

    def split(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """The parameters in a tensor of this name, by path."""
        if not self.parts:
            return {}
        ends = np.cumsum([part.size for part in self.parts])[:-1]
        arrays = np.split(array, ends, self.axis)
        return {part.path: self.form.from_hf(own) for part, own in zip(self.parts, arrays, strict=True)}

    def join(self, parameters: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor of these parameters, which are in the order of `parts`."""
        if not self.parts:
            return np.zeros(self.shape, np.float32)
        arrays = [self.form.to_hf(parameter) for parameter in parameters]
        return np.concatenate(arrays, self.axis) if len(arrays) > 1 else arrays[0]
