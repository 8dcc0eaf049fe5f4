"""From tokenised documents to batches: packing, shuffling, mixing, sharing among hosts.

The stream of rows is a function of seed and index: nothing is drawn on the way. So the state of a stream is one number,
the next batch, and a host computes its own rows without reading those of the others.
"""

import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import grain
import numpy as np
from flax import struct

from zamba2_jax.train.documents import Documents

PAD = 0
"""Stands where there is no document; what it is has no meaning."""

WINDOW = 4096
"""Documents that are shuffled together: what is computed and looked up for a row, however large its source is."""

READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
"""Threads that read ahead, and batches that they keep ready."""


@struct.dataclass
class Batch:
    """Rows of packed documents.

    Attributes:
        tokens: ids, int32 [b, t].
        segment_ids: 1, 2, ... for the documents of a row, 0 for padding, int32 [b, t]; see `zamba2_jax.ops.segments`.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray


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
        """A row, tokens and segment_ids int32 [t]; or a slice of the rows."""
        if isinstance(index, slice):
            return self.slice(index)
        epoch, row = divmod(index, self._rows)
        tokens, segment_ids = np.full(self._length, PAD, np.int32), np.zeros(self._length, np.int32)
        filled = 0
        for number, (start, stop) in enumerate(self._pieces(epoch, row * self._length), 1):
            piece = slice(filled, filled + stop - start)
            tokens[piece], segment_ids[piece] = self._documents.read(start, stop), number
            filled = piece.stop
        return Batch(tokens=tokens, segment_ids=segment_ids)

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
    sources: Mapping[str, Documents],
    shares: Mapping[str, float],
    *,
    batch_size: int,
    length: int,
    seed: int | Sequence[int],
    host_index: int = 0,
    host_count: int = 1,
) -> grain.IterDataset[Batch]:
    """An endless stream of batches whose rows come from several sources in fixed shares.

    A source that is used up begins a new epoch, in a new order. The order of a source depends on the seed and its name,
    not on what it is mixed with. Hosts take turns with whole batches of `batch_size / host_count` rows: step for step
    their batches, one after the other, are the batch that a single host would see.

    An iterator over the stream has `get_state()`, which is a dict for JSON, and `set_state(state)`, after which it
    gives the same batches, bit for bit, on any number of hosts.

    Args:
        sources: documents by name.
        shares: of the rows, how much each source gives; relative to their sum.
        batch_size: rows of a step on all hosts together.
        length: tokens of a row.
        seed: none negative; fixes the order.
        host_index, host_count: which host this is, of how many.

    Raises:
        ValueError: a share is negative or names no source, all are 0, hosts do not divide the batch, a seed is
            negative, or as `PackedRows`.
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
        [_shuffled_rows(sources[name], length, [*seeds, zlib.crc32(name.encode())]) for name in taken],
        Shares(list(taken.values())),
    )
    by_host = rows.batch(batch_size // host_count, drop_remainder=True, batch_fn=_stack)
    return by_host[host_index::host_count].to_iter_dataset(READ)


def held_out(documents: Documents, *, batch_size: int, length: int) -> list[Batch]:
    """All documents once and in order, to evaluate on; the last batch is filled up with empty rows.

    Raises:
        ValueError: `batch_size` is below 1, or as `PackedRows`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected at least 1")
    packed = PackedRows(documents, length, seed=None)
    empty = Batch(tokens=np.full(length, PAD, np.int32), segment_ids=np.zeros(length, np.int32))
    rows = [packed[row] for row in range(len(packed))] + [empty] * (-len(packed) % batch_size)
    return [_stack(rows[first : first + batch_size]) for first in range(0, len(rows), batch_size)]


def _shuffled_rows(documents: Documents, length: int, entropy: Sequence[int]) -> grain.MapDataset[Batch]:
    """Rows of shuffled documents, themselves shuffled, epoch after epoch."""
    of_documents, of_rows = (int(state) for state in np.random.SeedSequence(entropy).generate_state(2))
    return PackedRows(documents, length, seed=of_documents).shuffle(of_rows).repeat()


def _stack(rows: Iterable[Batch]) -> Batch:
    tokens, segment_ids = zip(*((row.tokens, row.segment_ids) for row in rows), strict=True)
    return Batch(tokens=np.stack(tokens), segment_ids=np.stack(segment_ids))
