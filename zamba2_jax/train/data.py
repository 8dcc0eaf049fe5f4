"""From tokenised documents to batches: packing, shuffling, mixing.

Everything is a function of seed and step, so a run can start at any step and see the batches it would have seen.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from flax import struct

from zamba2_jax.train.tokenizer import PAD


@struct.dataclass
class Batch:
    """Rows of packed documents.

    Attributes:
        tokens: ids, int32 [b, t].
        segment_ids: 1, 2, ... for the documents of a row, 0 for padding, int32 [b, t]; see `zamba2_jax.ops.segments`.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray


def pack(documents: Sequence[np.ndarray], length: int) -> Batch:
    """Lays documents end to end and cuts them into rows of `length` tokens.

    Every token lands in exactly one row, in order. A document that meets the end of a row goes on in the next one, as
    a document of its own there. The last row is padded. The number of rows does not depend on the order.

    Raises:
        ValueError: there are no tokens, or `length` is below 2, which leaves nothing to predict.
    """
    if length < 2:
        raise ValueError(f"sequence length={length}: expected at least 2")
    sizes = [len(document) for document in documents]
    if not sum(sizes):
        raise ValueError("no tokens to pack: expected at least one document that is not empty")
    rows = -(-sum(sizes) // length)
    tokens = np.full(rows * length, PAD, np.int32)
    tokens[: sum(sizes)] = np.concatenate(documents)
    document = np.zeros(rows * length, np.int32)
    document[: sum(sizes)] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    by_row = document.reshape(rows, length)
    starts = np.diff(by_row, axis=1, prepend=-1) != 0
    segment_ids = np.where(by_row != 0, np.cumsum(starts, axis=1), 0).astype(np.int32)
    return Batch(tokens=tokens.reshape(rows, length), segment_ids=segment_ids)


def batches(rows: Batch, batch_size: int) -> list[Batch]:
    """Cuts rows into batches of `batch_size`; the last one is filled up with empty rows."""

    def cut(array: np.ndarray) -> np.ndarray:
        filled = np.pad(array, ((0, -len(array) % batch_size), (0, 0)))
        return filled.reshape(-1, batch_size, array.shape[1])

    return [Batch(*pair) for pair in zip(cut(rows.tokens), cut(rows.segment_ids), strict=True)]


class Source:
    """An endless stream of rows from one set of documents, anew in random order in every epoch.

    Attributes:
        rows_per_epoch: rows that hold every token once.
    """

    def __init__(self, documents: Sequence[np.ndarray], length: int, *, seed: int | Sequence[int]):
        """Rows of `length` tokens; `seed` fixes their order.

        Raises:
            ValueError: as `pack`.
        """
        self._documents, self._length = list(documents), length
        self._seed = np.atleast_1d(seed).tolist()
        self._epoch, self._rows = 0, self._shuffle(0)
        self.rows_per_epoch = len(self._rows.tokens)

    def rows(self, indices: np.ndarray) -> Batch:
        """The rows with these indices, from 0, in ascending order."""
        epochs, places = np.divmod(indices, self.rows_per_epoch)
        parts = [(self._in_epoch(int(epoch)), places[epochs == epoch]) for epoch in np.unique(epochs)]
        return Batch(
            tokens=np.concatenate([rows.tokens[place] for rows, place in parts]),
            segment_ids=np.concatenate([rows.segment_ids[place] for rows, place in parts]),
        )

    def _in_epoch(self, epoch: int) -> Batch:
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, self._shuffle(epoch)
        return self._rows

    def _shuffle(self, epoch: int) -> Batch:
        """Documents in random order, packed, and then the rows in random order."""
        random = np.random.default_rng([*self._seed, epoch])
        packed = pack([self._documents[i] for i in random.permutation(len(self._documents))], self._length)
        order = random.permutation(len(packed.tokens))
        return Batch(tokens=packed.tokens[order], segment_ids=packed.segment_ids[order])


class Mixture:
    """Batches whose rows come from several sources in fixed shares.

    Rows are dealt to the source that is furthest behind its share, so after any number of rows each source has given
    its share of them to within one row.
    """

    def __init__(self, sources: Mapping[str, Source], shares: Mapping[str, float], batch_size: int, steps: int):
        """`steps` batches of `batch_size` rows; `shares` are none negative and sum to 1, as `Phase` checks.

        Raises:
            ValueError: a share names no source, or a size is below 1.
        """
        missing = sorted(set(shares) - set(sources))
        if missing:
            raise ValueError(f"the mixture names {missing}: expected sources among {sorted(sources)}")
        for name, value in (("batch_size", batch_size), ("steps", steps)):
            if value < 1:
                raise ValueError(f"{name}={value}: expected an integer >= 1")
        self._sources = [sources[name] for name in shares]
        self._batch_size = batch_size
        self._source_of, self._index = _deal(np.array(list(shares.values())), steps * batch_size)

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0; rows of one source stand together."""
        rows = slice(step * self._batch_size, (step + 1) * self._batch_size)
        source_of, index = self._source_of[rows], self._index[rows]
        parts = [self._sources[i].rows(index[source_of == i]) for i in np.unique(source_of)]
        return Batch(
            tokens=np.concatenate([part.tokens for part in parts]),
            segment_ids=np.concatenate([part.segment_ids for part in parts]),
        )


def _deal(shares: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """For each row the source it comes from, and how many rows that source gave before."""
    given = np.zeros(len(shares), np.int64)
    source_of, index = np.empty(rows, np.int64), np.empty(rows, np.int64)
    for row in range(rows):
        source = int(np.argmax(shares * (row + 1) - given))
        source_of[row], index[row] = source, given[source]
        given[source] += 1
    return source_of, index
