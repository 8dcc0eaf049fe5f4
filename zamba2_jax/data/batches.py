"""From tokenised documents to batches: packing, shuffling, mixing, sharing among hosts.

The stream of rows is a function of seed and index: nothing is drawn on the way. So the state of a stream is one number,
the next batch, and a host computes its own rows without reading those of the others.
"""

import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import grain
import jax
import numpy as np
from flax import struct

from zamba2_jax.data.documents import Documents

PAD = 0
"""Stands where there is no document; what it is has no meaning."""

WINDOW = 4096
"""Documents that are shuffled together: what is computed and looked up for a row, however large its source is."""

READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
"""Threads that read ahead, and batches that they keep ready."""

READ_FAR = grain.ReadOptions(num_threads=32, prefetch_buffer_size=32)
"""The same where a source is in an object store, and threads wait for it."""


@struct.dataclass
class Batch:
    """Rows of packed documents.

    Attributes:
        tokens: ids, int32 [b, t].
        segment_ids: 1, 2, ... for the documents of a row, 0 for padding, int32 [b, t]; see `zamba2_jax.ops.segments`.
        weights: of predicting each token, none negative, float32 [b, t]: the loss is sum(weights * nll) / sum(weights),
            so that a token of weight 0 is context that is not learnt from. None is 1 everywhere.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    weights: np.ndarray | None = None


class RowSource(Protocol):
    """A source that makes its rows itself, without documents."""

    def training_rows(self, length: int, entropy: Sequence[int]) -> grain.MapDataset[Batch]:
        """Rows of `length` tokens without end, each a function of `entropy` and its index.

        Raises:
            ValueError: the rows are too short.
        """
        ...

    def held_out_rows(self, length: int) -> Sequence[Batch]:
        """A fixed number of rows to evaluate on, always the same.

        Raises:
            ValueError: the rows are too short.
        """
        ...


Source = Documents | RowSource


class PackedRows(grain.MapDataset[Batch]):
    """Documents laid end to end in random order and cut into rows of `length` tokens.

    Every token lands in exactly one row of an epoch. A document that meets the end of a row goes on in the next one, as
    a document of its own there. The last row of an epoch is padded. Index `e * len(rows) + i` is row i of epoch e, and
    every epoch has an order of its own.

    The order: documents change places within windows of `WINDOW` neighbours. To find a row takes the lengths of the
    documents in its window and no others, so that a source of any size is opened, and read anywhere, at once.
    """

    def __init__(self, documents: Documents, length: int, *, seed: int | None):
        """Rows in an order fixed by `seed`, in [0, 2^32); in the documents' own order if it is None.

        Every token has a weight of 1, padding 0.

        Raises:
            ValueError: there are no tokens, or `length` is below 2, which leaves nothing to predict.
        """
        super().__init__()
        if length < 2:
            raise ValueError(f"sequence length={length}: expected at least 2")
        if not documents.tokens:
            raise ValueError("no tokens to pack: expected at least one document that is not empty")
        self._documents, self._length, self._seed = documents, length, seed
        self._windows = np.array(documents.offsets[:-1:WINDOW])
        self._rows = -(-documents.tokens // length)

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self._rows

    def __getitem__(self, index):
        """A row, of which each array is [t]; or a slice of the rows."""
        if isinstance(index, slice):
            return self.slice(index)
        epoch, row = divmod(index, self._rows)
        tokens, segment_ids = np.full(self._length, PAD, np.int32), np.zeros(self._length, np.int32)
        filled = 0
        for number, (start, stop) in enumerate(self._pieces(epoch, row * self._length), 1):
            piece = slice(filled, filled + stop - start)
            tokens[piece], segment_ids[piece] = self._documents.read(start, stop), number
            filled = piece.stop
        return Batch(tokens=tokens, segment_ids=segment_ids, weights=(segment_ids != 0).astype(np.float32))

    def _pieces(self, epoch: int, place: int) -> Iterator[tuple[int, int]]:
        """Where the documents of the row that begins at `place` are to be read, from `start` to `stop` each."""
        end = min(place + self._length, self._documents.tokens)
        while place < end:
            window = int(np.searchsorted(self._windows, place, side="right")) - 1
            starts, sizes = self._shuffled(epoch, window)
            ends = self._windows[window] + np.cumsum(sizes)
            first, last = np.searchsorted(ends, (place, end), side="right")
            documents = (array[first : last + 1].tolist() for array in (starts - ends + sizes, ends))
            for shift, document_end in zip(*documents, strict=True):
                stop = min(document_end, end)
                if place < stop:
                    yield shift + place, shift + stop
                    place = stop

    def _shuffled(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the documents of a window begin, and their sizes, in the order of the epoch."""
        offsets = np.asarray(self._documents.offsets[window * WINDOW : (window + 1) * WINDOW + 1])
        starts, sizes = offsets[:-1], np.diff(offsets)
        if self._seed is None:
            return starts, sizes
        order = np.random.default_rng((self._seed, epoch, window)).permutation(len(starts))
        return starts[order], sizes[order]


class Shares(grain.transforms.DatasetSelectionMap):
    """Deals the rows of a mixture to its sources in fixed shares, each source's own rows in their order.

    Of the first n rows of the mixture the first source gives its share, rounded; those left over are dealt to the other
    sources the same way.
    """

    def __init__(self, shares: Sequence[float]):
        self._shares = [round(share * 2**32) for share in shares]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        """The source that gives a row, and how many it has given before."""
        before, after, whole = index, index + 1, sum(self._shares)
        for source, share in enumerate(self._shares):
            given, given_after = ((2 * rows * share + whole) // (2 * whole) for rows in (before, after))
            if given < given_after:
                return source, given
            before, after, whole = before - given, after - given_after, whole - share
        raise AssertionError("the last source takes what is left")


def batches(
    sources: Mapping[str, Source],
    shares: Mapping[str, float],
    *,
    batch_size: int,
    length: int,
    seed: int | Sequence[int],
    host_index: int = 0,
    host_count: int = 1,
    vocab_size: int | None = None,
) -> grain.IterDataset[Batch]:
    """An endless stream of batches whose rows come from several sources in fixed shares.

    A source that is used up begins a new epoch, in a new order. The order of a source depends on the seed and its name,
    not on what it is mixed with. Hosts take turns with whole batches of `batch_size / host_count` rows: step for step
    their batches, one after the other, are the batch that a single host would see.

    An iterator over the stream has `get_state()`, which is a dict for JSON, and `set_state(state)`, after which it
    gives the same batches, bit for bit, on any number of hosts.

    Args:
        sources: documents, or what makes rows itself, by name.
        shares: of the rows, how much each source gives; relative to their sum.
        batch_size: rows of a step on all hosts together.
        length: tokens of a row.
        seed: none negative; fixes the order.
        host_index, host_count: which host this is, of how many.
        vocab_size: of the model; by default only negative ids are found to be wrong.

    Raises:
        ValueError: a share is negative or names no source, all are 0, hosts do not divide the batch, a seed is
            negative, or as `PackedRows`. When the row is made: a token, -100 say, is outside the vocabulary.
    """
    missing = sorted(set(shares) - set(sources))
    if missing:
        raise ValueError(f"the mixture names {missing}: expected sources among {sorted(sources)}")
    if min(shares.values(), default=0) < 0 or not sum(shares.values()):
        raise ValueError(f"shares={dict(shares)}: expected at least one above 0, none negative")
    if host_count < 1 or not 0 <= host_index < host_count:
        raise ValueError(f"host_index={host_index} of host_count={host_count}: expected an index below the count")
    if batch_size < 1 or batch_size % host_count:
        raise ValueError(f"batch_size={batch_size}: expected a multiple of the {host_count} hosts, at least 1")
    seeds = [int(value) for value in np.atleast_1d(seed)]
    if min(seeds) < 0:
        raise ValueError(f"seed={seed}: expected no negative number")
    taken = {name: share for name, share in shares.items() if share}
    rows = grain.MapDataset.select_from_datasets(
        [_training_rows(name, sources[name], length, seeds, vocab_size) for name in taken],
        Shares(list(taken.values())),
    )
    by_host = rows.batch(batch_size // host_count, drop_remainder=True, batch_fn=_stack)
    far = any(isinstance(source, Documents) and source.far for source in map(sources.get, taken))
    return by_host[host_index::host_count].to_iter_dataset(READ_FAR if far else READ)


def held_out(
    source: Source, *, batch_size: int, length: int, name: str = "held-out", vocab_size: int | None = None
) -> list[Batch]:
    """All documents once and in order, or the rows that a source holds out, to evaluate on.

    The last batch is filled up with empty rows.

    Args:
        source: documents, or what makes rows itself.
        batch_size: rows of a batch.
        length: tokens of a row.
        name: of the source, for messages.
        vocab_size: of the model; by default only negative ids are found to be wrong.

    Raises:
        ValueError: `batch_size` is below 1, a token is outside the vocabulary, or as `PackedRows`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected at least 1")
    packed = PackedRows(source, length, seed=None) if isinstance(source, Documents) else source.held_out_rows(length)
    check = _CheckIds(name, vocab_size)
    rows = [check.map_with_index(index, packed[index]) for index in range(len(packed))]
    zeros = np.zeros(length, np.int32)
    empty = Batch(tokens=np.full(length, PAD, np.int32), segment_ids=zeros, weights=zeros.astype(np.float32))
    rows += [empty] * (-len(packed) % batch_size)
    return [_stack(rows[first : first + batch_size]) for first in range(0, len(rows), batch_size)]


class _CheckIds(grain.transforms.MapWithIndex):
    """Finds tokens outside the vocabulary as their rows are made; it costs a look at each row, not at all documents."""

    def __init__(self, name: str, vocab_size: int | None):
        self._name, self._vocab_size = name, vocab_size

    def map_with_index(self, index: int, row: Batch) -> Batch:
        """The row."""
        tokens, limit = row.tokens, np.inf if self._vocab_size is None else self._vocab_size
        if tokens.min() < 0 or tokens.max() >= limit:
            position = int(np.argmax((tokens < 0) | (tokens >= limit)))
            expected = "ids that are not negative" if self._vocab_size is None else f"ids in [0, {self._vocab_size})"
            raise ValueError(
                f"source {self._name!r}, row {index}, position {position}: token id {tokens[position]}: "
                f"expected {expected}; what is not to be learnt from has a weight of 0"
            )
        return row


def _training_rows(
    name: str, source: Source, length: int, seeds: Sequence[int], vocab_size: int | None
) -> grain.MapDataset[Batch]:
    """Rows of a source without end: of shuffled documents, themselves shuffled, epoch after epoch."""
    entropy = [*seeds, zlib.crc32(name.encode())]
    if isinstance(source, Documents):
        of_documents, of_rows = (int(state) for state in np.random.SeedSequence(entropy).generate_state(2))
        rows = PackedRows(source, length, seed=of_documents).shuffle(of_rows).repeat()
    else:
        rows = source.training_rows(length, entropy)
    return rows.map_with_index(_CheckIds(name, vocab_size))


def _stack(rows: Iterable[Batch]) -> Batch:
    return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)
