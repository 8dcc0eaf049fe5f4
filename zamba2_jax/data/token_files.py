"""Tokenised documents on disk: shards of tokens, where each document begins, and a manifest.

A directory holds

- manifest.json: what the rest is, checked when it is opened;
- offsets.bin: where each document begins, and last where the last one ends, in tokens, int64, little-endian;
- tokens-00000.array_record and on: documents end to end, cut into records of `RECORD_TOKENS` tokens without regard to
  where documents end, so that a piece of a long document is read as fast as a short one. A document lies in one shard.
  Records are not compressed, so that one can be read alone from an object store;
- windows.bin: where each `WINDOW`-th document begins, so that a large index need not be read to be opened.

The manifest is written last.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from grain.sources import ArrayRecordDataSource
from tokenizers import Tokenizer

from zamba2_jax.data.batches import WINDOW
from zamba2_jax.data.documents import Documents
from zamba2_jax.data.remote_tokens import Records, RemoteFile, RemoteOffsets, RemoteRecords
from zamba2_jax.storage.remote import RemoteDirectory, is_remote

MANIFEST, OFFSETS, WINDOWS = "manifest.json", "offsets.bin", "windows.bin"
FORMAT = "zamba2-tokens-1"
RECORD_TOKENS = 8192
OPENING_THREADS = 32


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of tokens.

    Attributes:
        file: its name in the directory.
        bytes: its size.
        documents, tokens: how many it holds.
        largest_id: of its tokens.
    """

    file: str
    bytes: int
    documents: int
    tokens: int
    largest_id: int

    @property
    def records(self) -> int:
        """Records in the file."""
        return -(-self.tokens // RECORD_TOKENS)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a directory of token files holds.

    Attributes:
        vocab_size: of the tokenizer.
        tokenizer: its `fingerprint`.
        dtype: of the tokens, "<u2" or "<u4".
        documents, tokens: in all shards.
        shards: in the order of their documents.
        text_bytes: of the texts that the tokens stand for, in UTF-8; None where that is not known.
    """

    vocab_size: int
    tokenizer: str
    dtype: str
    documents: int
    tokens: int
    shards: tuple[Shard, ...]
    text_bytes: int | None = None


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of the vocabulary: tokenizers with the same one read each other's tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def write_token_files(
    directory: Path,
    documents: Iterable[np.ndarray],
    tokenizer: Tokenizer,
    *,
    shard_tokens: int,
    text_bytes: Callable[[], int | None] = lambda: None,
) -> Manifest:
    """Fills an empty directory; memory does not grow with the documents.

    Args:
        directory: to write to.
        documents: the tokens of each, none empty.
        tokenizer: that made them.
        shard_tokens: a shard is closed by the document that reaches it.
        text_bytes: says, when all documents have been taken, what their texts come to in UTF-8.

    Raises:
        ValueError: a token is outside the vocabulary; the message names shard, document and position.
    """
    vocab_size = tokenizer.get_vocab_size()
    dtype = "<u2" if max(tokenizer.get_vocab().values()) < 2**16 else "<u4"  # ids may have gaps
    shards: list[Shard] = []
    writer, end = None, 0
    with (directory / OFFSETS).open("wb") as offsets, (directory / WINDOWS).open("wb") as windows:
        offsets.write(np.array(end, "<i8").tobytes())
        for number, document in enumerate(documents):
            if number % WINDOW == 0:
                windows.write(np.array(end, "<i8").tobytes())
            writer = writer or _ShardWriter(directory / f"tokens-{len(shards):05d}.array_record", dtype)
            writer.add(document)
            end += len(document)
            offsets.write(np.array(end, "<i8").tobytes())
            if writer.tokens >= shard_tokens:
                shards.append(writer.close())
                writer = None
    if writer:
        shards.append(writer.close())
    manifest = Manifest(
        vocab_size=vocab_size,
        tokenizer=fingerprint(tokenizer),
        dtype=dtype,
        documents=sum(shard.documents for shard in shards),
        tokens=end,
        shards=tuple(shards),
        text_bytes=text_bytes(),
    )
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(manifest)}, indent=1) + "\n"
    (directory / MANIFEST).write_text(text, encoding="utf-8")
    return manifest


def open_token_files(directory: str | os.PathLike[str], tokenizer: Tokenizer | None, *, vocab_size: int) -> Documents:
    """The documents of a directory that `write_token_files` filled; tokens are read when they are asked for.

    Args:
        directory: local or the URL of one in an object store; what it holds is checked as far as that takes no reading
            of tokens.
        tokenizer: must have the vocabulary of the one that made the tokens; None accepts any.
        vocab_size: of the model.

    Raises:
        ValueError: the manifest is none, a file is missing, truncated or not what the manifest says, the tokenizer is
            another one, or a token is not in the model's vocabulary; the message names the file.
        OSError: there is no such directory, or no manifest in it; or the store refuses, or cannot be reached.
    """
    far, place = is_remote(directory), os.fspath(directory)
    files = _RemoteFiles(RemoteDirectory(place)) if far else _LocalFiles(Path(place))
    manifest = files.manifest()
    if tokenizer is not None and fingerprint(tokenizer) != manifest.tokenizer:
        raise ValueError(
            f"{directory}: made by another tokenizer, of {manifest.vocab_size} tokens; "
            f"expected the one given, of {tokenizer.get_vocab_size()}"
        )
    for shard in manifest.shards:
        _check_size(files, shard.file, shard.bytes)
    _check_size(files, OFFSETS, 8 * (manifest.documents + 1))
    with ThreadPoolExecutor(OPENING_THREADS) as executor:
        records = list(executor.map(lambda shard: files.records(shard, manifest), manifest.shards))
    tokens = _Tokens(manifest, records, str(directory))
    tokens.check_ids(vocab_size)
    offsets = files.offsets(manifest)
    if (offsets[0], offsets[-1]) != (0, manifest.tokens):
        raise ValueError(
            f"{directory}/{OFFSETS}: from {offsets[0]} to {offsets[-1]}: expected 0 to {manifest.tokens} tokens"
        )
    return Documents(offsets, tokens.read, manifest.text_bytes, far=far)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a local directory of token files.

    Raises:
        ValueError: it is not one, or of another format.
        OSError: it cannot be read.
    """
    return _LocalFiles(directory).manifest()


class _LocalFiles:
    """The files of a directory of this machine."""

    def __init__(self, directory: Path):
        self.directory = directory

    def manifest(self) -> Manifest:
        path = self.directory / MANIFEST
        if not path.is_file():
            raise _no_manifest(path)
        return _parse_manifest(path.read_bytes(), path)

    def size(self, name: str) -> int | None:
        path = self.directory / name
        return path.stat().st_size if path.is_file() else None

    def records(self, shard: Shard, manifest: Manifest) -> Records:
        path = self.directory / shard.file
        try:
            records = ArrayRecordDataSource(str(path))
        except RuntimeError as error:
            raise ValueError(f"{path} is no ArrayRecord file: {error}") from error
        if len(records) != shard.records:
            raise ValueError(f"{path}: {len(records)} records, expected {shard.records}")
        return records

    def offsets(self, manifest: Manifest) -> np.ndarray:
        return np.memmap(self.directory / OFFSETS, dtype="<i8", mode="r")


class _RemoteFiles:
    """The files of a directory in an object store."""

    def __init__(self, directory: RemoteDirectory):
        self.directory, self._sizes = directory, directory.sizes()

    def manifest(self) -> Manifest:
        path = f"{self.directory}/{MANIFEST}"
        if MANIFEST not in self._sizes:
            raise _no_manifest(path)
        content = self.directory.read(MANIFEST)
        self._version = hashlib.sha256(content).hexdigest()
        return _parse_manifest(content, path)

    def size(self, name: str) -> int | None:
        return self._sizes.get(name)

    def records(self, shard: Shard, manifest: Manifest) -> Records:
        width = np.dtype(manifest.dtype).itemsize
        return RemoteRecords(self._file(shard.file), RECORD_TOKENS * width, shard.tokens * width)

    def offsets(self, manifest: Manifest) -> RemoteOffsets:
        _check_size(self, WINDOWS, 8 * -(-manifest.documents // WINDOW))
        return RemoteOffsets(self._file(OFFSETS), WINDOW, self._file(WINDOWS))

    def _file(self, name: str) -> RemoteFile:
        return RemoteFile(self.directory, self._version, name, self._sizes[name])


def _no_manifest(path: Path | str) -> FileNotFoundError:
    return FileNotFoundError(f"{path} is missing: expected a directory that `zamba2 tokenize` wrote")


def _parse_manifest(content: bytes, path: Path | str) -> Manifest:
    try:
        values: dict[str, Any] = json.loads(content)
        written = values.pop("format")
        if written != FORMAT:
            raise ValueError(f"its format is {written!r}: expected {FORMAT!r}")
        values["shards"] = tuple(Shard(**shard) for shard in values["shards"])
        return Manifest(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no manifest of token files: {error}") from error


class _ShardWriter:
    """Writes one shard."""

    def __init__(self, path: Path, dtype: str):
        self._path, self._dtype = path, dtype
        self._file = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        self._rest = np.empty(0, dtype)
        self._documents = self.tokens = self._largest_id = 0

    def add(self, document: np.ndarray) -> None:
        """Appends a document; tokens that do not fill a record wait for the next one."""
        if document.min() < 0 or document.max() > np.iinfo(self._dtype).max:
            position = int(np.argmax((document < 0) | (document > np.iinfo(self._dtype).max)))
            raise ValueError(
                f"{self._path}, document {self._documents}, position {position}: token id {document[position]} is "
                "outside the vocabulary"
            )
        self._documents += 1
        self.tokens += len(document)
        self._largest_id = max(self._largest_id, int(document.max()))
        waiting = np.concatenate([self._rest, document.astype(self._dtype)])
        full = len(waiting) // RECORD_TOKENS * RECORD_TOKENS
        for record in waiting[:full].reshape(-1, RECORD_TOKENS):
            self._file.write(record.tobytes())
        self._rest = waiting[full:]

    def close(self) -> Shard:
        """Writes what waits, and says what the shard holds."""
        if len(self._rest):
            self._file.write(self._rest.tobytes())
        self._file.close()
        size = self._path.stat().st_size
        return Shard(self._path.name, size, self._documents, self.tokens, self._largest_id)


class _Tokens:
    """The tokens of all shards by their place in the whole."""

    def __init__(self, manifest: Manifest, records: Sequence[Records], directory: str):
        self._paths = [f"{directory}/{shard.file}" for shard in manifest.shards]
        self._shards, self._dtype, self._records = manifest.shards, manifest.dtype, records
        self._begins = np.cumsum([0, *(shard.tokens for shard in self._shards)])

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens from `start` to `stop`, both in one shard or at its ends."""
        if start == stop:
            return np.empty(0, np.int32)
        shard = int(np.searchsorted(self._begins, start, side="right")) - 1
        first, last = ((place - int(self._begins[shard])) // RECORD_TOKENS for place in (start, stop - 1))
        records = [self._record(shard, index) for index in range(first, last + 1)]
        begin = start - int(self._begins[shard]) - first * RECORD_TOKENS
        return np.concatenate(records)[begin : begin + stop - start].astype(np.int32)

    def check_ids(self, vocab_size: int) -> None:
        """Raises a ValueError that names file and record if a token is outside the vocabulary."""
        for number, shard in enumerate(self._shards):
            if shard.largest_id >= vocab_size:
                record = next(i for i in range(shard.records) if self._record(number, i).max() == shard.largest_id)
                raise ValueError(
                    f"{self._paths[number]}, record {record}: token id {shard.largest_id} is outside the vocabulary "
                    f"of {vocab_size} tokens"
                )

    def _record(self, shard: int, index: int) -> np.ndarray:
        try:
            return np.frombuffer(self._records[shard][index], self._dtype)
        except RuntimeError as error:
            raise ValueError(f"{self._paths[shard]}, record {index}: cannot be read: {error}") from error


def _check_size(files: _LocalFiles | _RemoteFiles, name: str, size: int) -> None:
    path, found = f"{files.directory}/{name}", files.size(name)
    if found is None:
        raise ValueError(f"{path} is missing: expected a file of {size} bytes")
    if found != size:
        raise ValueError(f"{path}: {found} bytes, expected {size}: it is truncated, or was changed")
