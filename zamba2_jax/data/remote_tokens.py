"""Token files in an object store, read a record or a piece of the index at a time.

An ArrayRecord file is a Riegeli file: blocks of 64 KiB, of which the first 24 bytes are a header, and in the rest of
them, laid end to end, chunks of a header of 40 bytes and data. `zamba2 tokenize` writes one record to a chunk, not
compressed, and all records but the last of one size. So where a record is follows from its number. (The layout:
https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md)
"""

import dataclasses
import struct
from collections.abc import Sequence

import numpy as np

from zamba2_jax.storage.blocks import blocks
from zamba2_jax.storage.remote import RemoteDirectory

_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
_PAYLOAD = _BLOCK - _BLOCK_HEADER
_INT64 = 8


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file in an object store, read through the cache of this machine.

    Attributes:
        remote: its directory.
        version: changes when the files there do.
        name: its name.
        size: in bytes.
    """

    remote: RemoteDirectory
    version: str
    name: str
    size: int

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`."""
        return blocks().read(self.remote, self.version, self.name, start, stop)


@dataclasses.dataclass(frozen=True)
class RemoteRecords:
    """The records of an ArrayRecord file.

    Attributes:
        file: the file.
        record_bytes: of every record but the last.
        total_bytes: of all records.
    """

    file: RemoteFile
    record_bytes: int
    total_bytes: int

    def __getitem__(self, index: int) -> bytes:
        """A record.

        Raises:
            ValueError: what is there is not a record as it is expected.
            OSError: the store refuses, or cannot be reached.
        """
        size = min(self.record_bytes, self.total_bytes - index * self.record_bytes)
        before = _chunk_bytes(self.record_bytes) * index + _CHUNK_HEADER  # the file begins with a chunk without data
        first, last = _place(before), _place(before + _chunk_bytes(size) - 1)
        if last >= self.file.size:
            raise ValueError(f"{self._name(index)}: the file ends before it")
        content = self.file.read(first, last + 1)
        ends = range(_BLOCK - first % _BLOCK, len(content), _BLOCK)
        pieces = [content[: ends[0]] if ends else content]
        pieces += [content[end + _BLOCK_HEADER : end + _BLOCK] for end in ends]
        chunk = b"".join(pieces)
        prefix = _prefix(size)
        expected = (len(prefix) + size, ord("r") | 1 << 8, size)
        if tuple(struct.unpack_from("<8xQ8xQQ", chunk)) != expected or not chunk.startswith(prefix, _CHUNK_HEADER):
            raise ValueError(
                f"{self._name(index)}: expected {size} bytes that are not compressed: the file is damaged, or of an "
                "earlier version, and can be read from an object store when `zamba2 tokenize` has written it again"
            )
        return chunk[_CHUNK_HEADER + len(prefix) :]

    def _name(self, index: int) -> str:
        return f"{self.file.remote}/{self.file.name}, record {index}"


@dataclasses.dataclass(frozen=True)
class RemoteOffsets:
    """Where documents begin, as an array of int64 of which only what is asked for is read.

    Attributes:
        file: all of them.
        every: the step of slices for which `sparse` is read.
        sparse: each `every`-th of them, from the first.
    """

    file: RemoteFile
    every: int
    sparse: RemoteFile

    def __len__(self) -> int:
        return self.file.size // _INT64

    def __getitem__(self, index: int | slice) -> np.ndarray:
        if not isinstance(index, slice):
            place = range(len(self))[index]
            return _read(self.file, place, place + 1)[0]
        places = range(len(self))[index]
        if places.step == self.every and places.start == 0:
            return _read(self.sparse, 0, len(places))
        return _read(self.file, places.start, places.stop)[:: places.step] if places else np.empty(0, "<i8")


Offsets = np.ndarray | RemoteOffsets
Records = Sequence[bytes] | RemoteRecords


def _read(file: RemoteFile, start: int, stop: int) -> np.ndarray:
    return np.frombuffer(file.read(start * _INT64, stop * _INT64), "<i8")


def _place(before: int) -> int:
    """Where in the file is what has so many bytes of chunks before it."""
    return before + _BLOCK_HEADER * (before // _PAYLOAD + 1)


def _prefix(size: int) -> bytes:
    """What the data of a chunk begins with: no compression, and the sizes of the sizes and of its one record."""
    varint = _varint(size)
    return b"\0" + _varint(len(varint)) + varint


def _chunk_bytes(size: int) -> int:
    return _CHUNK_HEADER + len(_prefix(size)) + size


def _varint(number: int) -> bytes:
    """Seven bits to a byte, the lowest first."""
    content = bytearray()
    while number >= 128:
        content.append(number & 127 | 128)
        number >>= 7
    return bytes([*content, number])
