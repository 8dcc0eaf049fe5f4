"""Where documents come from: text, JSON lines, parquet, token files and the embedded corpus."""

import codecs
import contextlib
import dataclasses
import gzip
import io
import json
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast, get_args

import numpy as np

from zamba2_jax.data.corpus import code, held_out_code, held_out_prose, training_prose
from zamba2_jax.data.documents import Documents, in_memory
from zamba2_jax.data.token_files import open_token_files
from zamba2_jax.text.frame import encode_documents, frame_of
from zamba2_jax.text.stream import has_lone_surrogate
from zamba2_jax.text.tokenizer import Tokenizer

Kind = Literal["text", "jsonl", "parquet", "tokens", "prose", "held_out_prose", "code", "held_out_code"]

SUFFIXES = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
"""How a file of texts is told from its name."""

COMPRESSED = (".gz", ".zst")
"""What may follow a suffix of text or JSON lines."""

EMBEDDED = {
    "prose": training_prose,
    "held_out_prose": held_out_prose,
    "code": code,
    "held_out_code": held_out_code,
}

MAX_IN_MEMORY = 256 * 2**20
"""Bytes of files that are tokenised when they are opened; more take `zamba2 tokenize`."""

ROWS_PER_READ = 256
"""Of a parquet file."""

CHUNK = 2**20
"""Characters that are tokenised together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A set of documents to train on.

    Attributes:
        kind: "text": each file, in UTF-8, is a document. "jsonl": each line is an object with a text, or in a .json
            file each entry of a list. "parquet": each row has a text. "tokens": what `zamba2 tokenize` wrote. "prose",
            "code": the embedded corpus, without what is in "held_out_prose" and "held_out_code".
        path: a file, or a directory of which all files of the kind are read, by their `SUFFIXES`, sorted by name; for
            "tokens" the directory; None for the embedded corpus.
        field: that holds the text, in "jsonl" and "parquet".
        bos, eos: texts of the tokens around a document, "" for none; by default those of the tokenizer, by the rules of
            `zamba2_jax.text.frame`.
        special_tokens: whether names of special tokens in a text become these tokens; else they stay text.

    Raises:
        ValueError: the kind is unknown, or has no path, or takes none, or is of texts in an object store, or is
            "tokens" and says how to tokenize.
    """

    kind: Kind
    path: str | None = None
    field: str = "text"
    bos: str | None = None
    eos: str | None = None
    special_tokens: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"source kind={self.kind!r}: expected one of {', '.join(get_args(Kind))}")
        if (self.path is None) != (self.kind in EMBEDDED):
            raise ValueError(
                f"source kind={self.kind!r} with path={self.path!r}: expected "
                f"{'none' if self.kind in EMBEDDED else 'a file or a directory'}"
            )
        if self.kind != "tokens" and self.path is not None:
            _require_here(self.path)
        for name in ("bos", "eos", "special_tokens"):
            if self.kind == "tokens" and getattr(self, name) not in (None, False):
                raise ValueError(
                    f"source kind='tokens' with {name}={getattr(self, name)!r}: expected none, it is tokenized already"
                )


_URL = re.compile(r"\w+:/")  # with the one slash that is left of a URL in a Path


class Text(NamedTuple):
    """One text of a source.

    Attributes:
        text: the document; never empty.
        place: where it stands, for messages.
        size: the bytes of its file that it stands for; those of all texts of a file sum to the file's.
    """

    text: str
    place: str
    size: int


Progress = Callable[[int], object]
"""Is told the bytes that were done since it was last told."""


def open_documents(
    config: SourceConfig, tokenizer: Tokenizer | None, *, vocab_size: int, progress: Progress | None = None
) -> Documents:
    """The tokens of a source, each document in its frame; everything that can be wrong with it is found here.

    Texts are tokenised now and kept in memory; token files are read when they are used.

    Args:
        config: the source.
        tokenizer: for texts; with token files it is compared with the one that made them, unless it is None.
        vocab_size: of the model.
        progress: is told of the bytes of text as they are tokenised.

    Raises:
        ValueError: a file is empty or not what it should be, or a token is outside the vocabulary; the message names
            file and line, row or record. Or there is more text than `MAX_IN_MEMORY`.
        OSError: a file cannot be read.
    """
    if config.kind == "tokens":
        backend = None if tokenizer is None else tokenizer.backend
        return open_token_files(str(config.path), backend, vocab_size=vocab_size)
    if tokenizer is None:
        raise ValueError(f"a source of kind {config.kind!r} takes a tokenizer")
    size = size_of(config)
    if size > MAX_IN_MEMORY:
        raise ValueError(
            f"{config.path}: {size / 2**20:.0f} MB of text, expected at most {MAX_IN_MEMORY / 2**20:.0f} to tokenize "
            "in memory: write token files with `zamba2 tokenize` and give their directory as a source of kind 'tokens'"
        )
    if config.path is not None and Path(config.path).is_dir():
        _name_skipped(Path(config.path), [config.kind], config.field)
    documents: list[np.ndarray] = []
    frame = frame_of(tokenizer, config.bos, config.eos)
    text_bytes = 0
    for texts in chunks(read_texts(config)):
        tokens = encode_documents(tokenizer, [text.text for text in texts], frame, special_tokens=config.special_tokens)
        for text, document in zip(texts, tokens, strict=True):
            if document.max(initial=0) >= vocab_size:
                raise ValueError(
                    f"{text.place}: token id {document.max()} is outside the vocabulary of {vocab_size} tokens"
                )
        documents += tokens
        text_bytes += sum(len(text.text.encode()) for text in texts)
        if progress is not None:
            progress(sum(text.size for text in texts))
    return in_memory(documents, text_bytes)


def sources_at(
    path: Path, field: str = "text", *, bos: str | None = None, eos: str | None = None, special_tokens: bool = False
) -> list[SourceConfig]:
    """The sources of texts in a file or a directory, their kinds told by the `SUFFIXES`.

    A warning names files of a directory that are left out.

    Args:
        path: of the file or directory.
        field, bos, eos, special_tokens: as in `SourceConfig`.

    Raises:
        ValueError: there are none.
        OSError: there is no such file or directory.
    """
    kinds: Sequence[Kind] = ("text", "jsonl", "parquet")
    if path.is_dir():
        found = [kind for kind in kinds if any(_files_in(path, kind, field))]
        _name_skipped(path, found, field)
    else:
        _require(path)
        found = [kind for kind in kinds if _kind_of(path) == kind]
    if not found:
        raise ValueError(
            f"{path}: no texts there, expected files named {', '.join(f'*{suffix}' for suffix in SUFFIXES)}"
        )
    return [
        SourceConfig(kind=kind, path=str(path), field=field, bos=bos, eos=eos, special_tokens=special_tokens)
        for kind in found
    ]


def size_of(config: SourceConfig) -> int:
    """Bytes of the files of a source of texts; 0 if it is embedded.

    Raises:
        ValueError, OSError: as `read_texts`, where that takes no reading.
    """
    return 0 if config.path is None else sum(path.stat().st_size for path in _files(config))


def read_texts(config: SourceConfig) -> Iterator[Text]:
    """The texts of a source that is not tokenised, in a fixed order; those that are empty are left out.

    Raises:
        ValueError: a file is not what it should be, or holds no text; the message names file and line or row.
        OSError: a file cannot be read.
    """
    if config.path is None:
        for document in EMBEDDED[config.kind]():
            yield Text(document.text, f"{config.kind}, {document.name}", document.size)
        return
    for path in _files(config):
        texts = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}[config.kind](path, config.field)
        empty = True
        for text in texts:
            if text.text:
                empty = False
                if has_lone_surrogate(text.text):
                    raise ValueError(f"{text.place}: half of a surrogate pair, which is no text: {_shorten(text.text)}")
                yield text
        if empty:
            raise ValueError(f"{path}: no text in it, expected at least one document")


def chunks(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Texts in lists of about `CHUNK` characters."""
    chunk: list[Text] = []
    room = CHUNK
    for text in texts:
        chunk.append(text)
        room -= len(text.text)
        if room <= 0:
            yield chunk
            chunk, room = [], CHUNK
    if chunk:
        yield chunk


def _files(config: SourceConfig) -> list[Path]:
    """The files of a source, of which there is at least one."""
    path = Path(str(config.path))
    if not path.is_dir():
        _require(path)
        return [path]
    files = sorted(_files_in(path, config.kind, config.field))
    if not files:
        expected = ", ".join(f"*{suffix}" for suffix, kind in SUFFIXES.items() if kind == config.kind)
        raise ValueError(f"{path}: no {config.kind} in it, expected files named {expected}")
    return files


def _files_in(directory: Path, kind: str, field: str) -> Iterator[Path]:
    return (path for path in _walk(directory) if _kind_of(path) == kind and _holds_texts(path, field))


def _walk(directory: Path) -> Iterator[Path]:
    """All files, but for those whose names, or whose directories', begin with a dot."""
    for path in directory.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(directory).parts):
            yield path


def _kind_of(path: Path) -> str | None:
    """The kind of a file, by its name."""
    name = path.name.lower()
    compressed = next((ending for ending in COMPRESSED if name.endswith(ending)), "")
    kind = SUFFIXES.get(Path(name.removesuffix(compressed)).suffix)
    return None if compressed and kind == "parquet" else kind


def _holds_texts(path: Path, field: str) -> bool:
    """Whether a file of a directory is one of texts: of .json files only those that are a list, or lines with texts."""
    if path.suffix.lower() != ".json":
        return True
    with path.open("rb") as file:
        line = file.readline()
    try:
        return _begins_list(line) or isinstance(json.loads(line.removeprefix(codecs.BOM_UTF8))[field], str)
    except (ValueError, KeyError, TypeError):
        return False


def _name_skipped(directory: Path, kinds: Sequence[str], field: str) -> None:
    """Warns of files that are not read."""
    read = {path for kind in kinds for path in _files_in(directory, kind, field)}
    skipped = sorted(str(path.relative_to(directory)) for path in _walk(directory) if path not in read)
    if skipped and read:
        listed = ", ".join(skipped[:5]) + (f" and {len(skipped) - 5} more" if len(skipped) > 5 else "")
        warnings.warn(f"{directory}: {listed}: not read as {' or '.join(kinds)}", stacklevel=3)


def _require_here(path: str) -> None:
    if _URL.match(path):
        raise ValueError(f"{path}: texts are read from this machine: expected a local path")


def _require(path: Path) -> None:
    _require_here(str(path))
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], int] | None]]:
    """A file, decompressed, and what tells how many bytes of a compressed one have been read."""
    with path.open("rb") as raw:
        try:
            if path.suffix.lower() == ".gz":
                yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)), raw.tell
            elif path.suffix.lower() == ".zst":
                yield _zstd(raw, path), raw.tell
            else:
                yield raw, None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: cannot be decompressed: {error}") from error


def _zstd(raw: BinaryIO, path: Path) -> BinaryIO:
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(f"{path}: reading .zst takes pyarrow: pip install 'zamba2-jax[parquet]'") from error
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))


def _read_text(path: Path, field: str) -> Iterator[Text]:
    with _opened(path) as (file, _):
        content = file.read()
    yield Text(_decode(content, str(path)), str(path), path.stat().st_size)


def _read_jsonl(path: Path, field: str) -> Iterator[Text]:
    with _opened(path) as (file, read):
        done = 0
        for number, line in enumerate(file, 1):
            if number == 1 and ".json" in path.suffixes and _begins_list(line):
                yield from _read_list(path, line + file.read(), field)
                return
            size = len(line) if read is None else read() - done
            done += size
            place = f"{path}, line {number}"
            if not line.strip():
                yield Text("", place, size)
                continue
            yield Text(_text_of(_parse(line, place), field, place), place, size)


def _begins_list(line: bytes) -> bool:
    return line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _read_list(path: Path, content: bytes, field: str) -> Iterator[Text]:
    values, size = _parse(content, str(path)), path.stat().st_size
    for i, value in enumerate(values):
        place = f"{path}, entry {i}"
        yield Text(_text_of(value, field, place), place, (i + 1) * size // len(values) - i * size // len(values))


def _parse(content: bytes, place: str) -> Any:
    try:
        return json.loads(_decode(content, place))
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error}") from error


def _text_of(value: object, field: str, place: str) -> str:
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        raise ValueError(f"{place}: expected an object with a text named {field!r}, not {_shorten(value)}")
    return value[field]


def _read_parquet(path: Path, field: str) -> Iterator[Text]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading parquet takes pyarrow: pip install 'zamba2-jax[parquet]'") from error
    try:
        file = parquet.ParquetFile(path)
        names, rows, size = file.schema_arrow.names, file.metadata.num_rows, path.stat().st_size
        if field not in names:
            raise ValueError(f"{path}: no column {field!r}, expected one of its columns, which are {', '.join(names)}")
        row = 0
        for batch in file.iter_batches(ROWS_PER_READ, columns=[field]):
            for value in batch.column(0).to_pylist():
                if not isinstance(value, str):
                    raise ValueError(f"{path}, row {row}: expected a text named {field!r}, not {_shorten(value)}")
                yield Text(value, f"{path}, row {row}", (row + 1) * size // rows - row * size // rows)
                row += 1
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: not a parquet file that can be read: {error}") from error


def _decode(content: bytes, place: str) -> str:
    """Text in UTF-8, without the byte order mark that it may begin with."""
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        where = f", line {line}" if line > 1 else ""
        raise ValueError(f"{place}{where}: not UTF-8: byte 0x{content[error.start]:02x} at {error.start}") from error


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
