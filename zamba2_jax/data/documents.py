"""Tokenised documents that can be read anywhere: one long row of tokens, and where each document begins in it."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from zamba2_jax.data.remote_tokens import Offsets


@dataclasses.dataclass(frozen=True)
class Documents:
    """A random-access sequence of documents, each an int32 array of tokens.

    Attributes:
        offsets: where each document begins, and last where the last one ends, in tokens, int64 [documents + 1]. It may
            be a map of a file, or read from an object store.
        read: the tokens from one place to another, both within one document or at its ends, int32.
        text_bytes: of the texts that the tokens stand for, in UTF-8; None where that is not known.
        far: whether reading may wait for a network, so that many threads are to read at a time.
    """

    offsets: Offsets
    read: Callable[[int, int], np.ndarray]
    text_bytes: int | None = None
    far: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.offsets[-1])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index}: expected 0 to {len(self) - 1}")
        return self.read(int(self.offsets[index]), int(self.offsets[index + 1]))

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))


def in_memory(documents: Iterable[np.ndarray], text_bytes: int | None = None) -> Documents:
    """Documents from the tokens of each, and the bytes of all their texts."""
    arrays = [np.empty(0, np.int32), *documents]
    tokens = np.concatenate(arrays, dtype=np.int32)
    offsets = np.cumsum([len(array) for array in arrays], dtype=np.int64)
    return Documents(offsets, lambda start, stop: tokens[start:stop], text_bytes)
