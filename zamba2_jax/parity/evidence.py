"""What the two sides computed, kept on disk, and how far they are from each other and from the oracle."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

GROUPS = ("embed", "layer", "conv_state", "ssm_state", "keys", "values", "logits", "loss", "gradient", "greedy")
"""Kinds of evidence, in the order in which they are reported."""

Items = Mapping[str, np.ndarray]
"""Some named arrays."""

TILE = 2**18
"""Values compared at a time: few enough for the cache."""
THREADS = 2
"""That compare at once: more would wait for memory."""


class Evidence:
    """Named arrays in a directory, float64 kept and all else as float32; read back by mapping."""

    def __init__(self, directory: Path):
        directory.mkdir(parents=True)
        self._directory = directory
        self.names: list[str] = []

    def add(self, items: Items) -> None:
        """Stores arrays under their names."""
        for name, array in items.items():
            dtype = np.float64 if array.dtype == np.float64 else np.float32
            np.save(self._directory / f"{len(self.names)}.npy", np.asarray(array, dtype))
            self.names.append(name)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> np.ndarray:
        return np.load(self._directory / f"{self.names.index(name)}.npy", mmap_mode="r")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Errors are norms over the whole array: `relative` is |ours - torch| / |torch|, the two `..._error` are
    |side - oracle| / |oracle|.

    Attributes:
        name: what is compared.
        group: one of `GROUPS`.
        max_error: largest absolute difference of ours and PyTorch's.
        relative: error of ours against PyTorch's.
        our_error, torch_error: errors of both against the float64 oracle.
        size: the oracle's norm.
    """

    name: str
    group: str
    max_error: float
    relative: float
    our_error: float
    torch_error: float
    size: float


def compare(name: str, group: str, ours: np.ndarray, torch: np.ndarray, oracle: np.ndarray) -> Row:
    """Compares one array of both sides and the oracle, a tile at a time.

    Raises:
        ValueError: the shapes differ.
    """
    if not ours.shape == torch.shape == oracle.shape:
        raise ValueError(f"{name}: ours has shape {ours.shape}, PyTorch's {torch.shape}, the oracle {oracle.shape}")
    sides = [x.reshape(-1) for x in (ours, torch, oracle)]

    def square(x: np.ndarray) -> float:
        return float(np.einsum("i,i", x, x))  # not np.dot, it has threads itself

    def tile(start: int) -> np.ndarray:
        """The largest difference, then the squares of the differences and of the sizes."""
        a, b, c = (x[start : start + TILE].astype(np.float64) for x in sides)
        sizes, between = [square(b), square(c)], a - b
        a -= c
        b -= c
        return np.array([max(between.max(), -between.min()), square(between), square(a), square(b), *sizes])

    with ThreadPoolExecutor(THREADS) as threads:
        tiles = np.array(list(threads.map(tile, range(0, oracle.size, TILE))))
    largest = float(tiles[:, 0].max())
    if not np.isfinite(tiles).all():
        return Row(name, group, math.nan, math.nan, math.nan, math.nan, math.nan)
    between, our_error, torch_error, torch_size, size = np.sqrt(tiles[:, 1:].sum(axis=0)).tolist()
    ratio = _ratio(between, torch_size), _ratio(our_error, size), _ratio(torch_error, size)
    return Row(name, group, largest, *ratio, size)


def summarize(rows: Iterable[Row], group: str) -> Row | None:
    """The rows of a group as one: the largest differences, and the errors of all its arrays as if they were one."""
    rows = [row for row in rows if row.group == group]
    if not rows:
        return None
    size = math.hypot(*(row.size for row in rows))
    our_error = math.hypot(*(row.our_error * row.size for row in rows))
    torch_error = math.hypot(*(row.torch_error * row.size for row in rows))
    return Row(
        group if len(rows) == 1 else f"{group} ({len(rows)})",
        group,
        _worst(row.max_error for row in rows),
        _worst(row.relative for row in rows),
        _ratio(our_error, size),
        _ratio(torch_error, size),
        size,
    )


def _worst(values: Iterable[float]) -> float:
    """The maximum; NaN if any is."""
    return float(np.max(list(values)))


def _ratio(error: float, size: float) -> float:
    if size:
        return error / size
    return 0.0 if error == 0 else math.inf
