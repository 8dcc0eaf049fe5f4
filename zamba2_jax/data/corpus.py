"""The embedded corpus: English prose and Python code that every CPython carries, so that nothing is downloaded.

Prose is the language reference and debugger manual that `help()` shows (`pydoc_data.topics`), code the sources of the
standard library. Both depend on the version of Python, and on nothing else.
"""

import os
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from zamba2_jax.data.documents import Documents, in_memory
from zamba2_jax.text.frame import encode_documents, frame_of
from zamba2_jax.text.tokenizer import Tokenizer
from zamba2_jax.text.vocabulary import train_tokenizer

# Directories of the standard library that are not its own modules, are tables, or would give the prose away.
_NOT_CODE = frozenset(
    "test tests idle_test site-packages dist-packages __pycache__ _bundled encodings idlelib lib2to3 turtledemo "
    "pydoc_data".split()
)
HELD_OUT_SHARE = 0.1
"""Of the prose, by bytes."""

_WORD = re.compile(r"[A-Za-z'\u2019]+")
# Inline markup and what it encloses: "code", *emphasis*, **strong emphasis**.
_MARKUP = re.compile(r'"([^"]+)"|\*\*(\w[^*]*)\*\*|\*(\w[^*]*)\*')


class Document(NamedTuple):
    """One text of a corpus.

    Attributes:
        name: what the document is called where it comes from; unique in its corpus.
        text: its content.
    """

    name: str
    text: str

    @property
    def size(self) -> int:
        """Bytes in UTF-8."""
        return len(self.text.encode())


def prose(min_size: int = 200) -> list[Document]:
    """Python's documentation topics, curated: running text only, each paragraph on one line and present once.

    Grammar rules, examples, tables, signatures and headings are left out, and so are the marks of inline markup.

    Several topics repeat others whole ("compound" holds "if", "for" and "try"); a paragraph stays in the longest topic
    it stands in. So documents share no paragraph, and a split by document is a clean one.

    Args:
        min_size: documents of fewer bytes are left out.

    Returns:
        The documents in the order of their names, about 250 kB.

    Raises:
        OSError: this Python has no documentation topics.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise OSError(f"this Python has no pydoc_data.topics, the prose of the embedded corpus: {error}") from error
    seen: set[str] = set()
    documents = []
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = [_plain(block) for block in re.split(r"\n\s*\n", topics[name])]
        fresh = [text for text in dict.fromkeys(paragraphs) if text not in seen and _is_running_text(text)]
        seen.update(fresh)
        documents.append(Document(name, "\n\n".join(fresh)))
    return sorted(document for document in documents if document.size >= min_size)


def code(max_size: int = 2_000_000) -> list[Document]:
    """Sources of the standard library, without tests, tables and vendored packages.

    Args:
        max_size: bytes to take at most; the files are a fixed pseudo-random choice.

    Returns:
        The documents in the order of their paths.

    Raises:
        OSError: this Python's standard library has no sources.
    """
    return sorted(_take(_code_files(), max_size))


def held_out_code(max_size: int = 60_000) -> list[Document]:
    """Sources of the standard library that are not in `code()`, to evaluate on.

    Args:
        max_size: bytes to take at most.

    Returns:
        The documents in the order of their paths.

    Raises:
        OSError: as `code`.
    """
    training = {document.name for document in code()}
    return sorted(_take((file for file in _code_files() if file[0] not in training), max_size))


def _code_files() -> Iterator[tuple[str, Path]]:
    """Sources of the standard library by their names, in a fixed pseudo-random order."""
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_CODE]
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    if not names:
        raise OSError(f"no Python sources under {root}, the code of the embedded corpus")
    for name in sorted(names, key=_shuffled):
        yield name, root / name


def _take(files: Iterable[tuple[str, Path]], max_size: int) -> Iterator[Document]:
    """The files that find room, one after the other."""
    for name, path in files:
        if 0 < path.stat().st_size <= max_size:
            document = Document(name, path.read_text(encoding="utf-8", errors="replace"))
            max_size -= document.size
            yield document


def split_held_out(documents: Sequence[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Splits a corpus by document, the same way every time.

    Args:
        documents: at least two.
        share: of the bytes, how much to hold out, at most but for one document.

    Returns:
        The documents to train on and those held out, neither empty.

    Raises:
        ValueError: there are too few documents, or `share` is not between 0 and 1.
    """
    if len(documents) < 2:
        raise ValueError(f"{len(documents)} documents: expected at least 2 to hold one out")
    if not 0 < share < 1:
        raise ValueError(f"held-out share={share}: expected a number in (0, 1)")
    room = share * sum(document.size for document in documents)
    held_out: list[Document] = []
    for document in sorted(documents, key=lambda document: _shuffled(document.name)):
        if document.size <= room:
            held_out.append(document)
            room -= document.size
    held_out = held_out or [min(documents, key=lambda document: document.size)]
    return [document for document in documents if document not in held_out], sorted(held_out)


class TokenizedCorpus(NamedTuple):
    """The embedded corpus, ready to train on.

    Attributes:
        tokenizer: trained on what is in `train`.
        train: documents by source: "code" and "prose".
        held_out: documents by the same names that are in neither.
        held_out_sizes: their bytes in UTF-8.
    """

    tokenizer: Tokenizer
    train: Mapping[str, Documents]
    held_out: Mapping[str, Documents]
    held_out_sizes: Mapping[str, int]


def training_prose() -> list[Document]:
    """The prose without what is held out.

    Raises:
        OSError: as `prose`.
    """
    return split_held_out(prose(), HELD_OUT_SHARE)[0]


def held_out_prose() -> list[Document]:
    """The prose that `training_prose` leaves out.

    Raises:
        OSError: as `prose`.
    """
    return split_held_out(prose(), HELD_OUT_SHARE)[1]


def tokenize_embedded_corpus(vocab_size: int) -> TokenizedCorpus:
    """Reads the embedded corpus, holds texts out, and trains a tokenizer on equal amounts of prose and code.

    Raises:
        OSError: this Python has no such texts.
        ValueError: `vocab_size` has no room for the bytes, or the texts do not fill it.
    """
    code_documents = code()
    prose_documents, prose_held_out = split_held_out(prose(), HELD_OUT_SHARE)
    held_out = {"code": held_out_code(), "prose": prose_held_out}
    tokenizer = _train_tokenizer(code_documents, prose_documents, vocab_size)

    def encode(documents: Sequence[Document]) -> Documents:
        texts = [document.text for document in documents]
        return in_memory(encode_documents(tokenizer, texts, frame_of(tokenizer)))

    return TokenizedCorpus(
        tokenizer=tokenizer,
        train={"code": encode(code_documents), "prose": encode(prose_documents)},
        held_out={name: encode(documents) for name, documents in held_out.items()},
        held_out_sizes={name: sum(document.size for document in documents) for name, documents in held_out.items()},
    )


def embedded_tokenizer(vocab_size: int) -> Tokenizer:
    """The tokenizer that `tokenize_embedded_corpus` trains.

    Raises:
        OSError, ValueError: as there.
    """
    return _train_tokenizer(code(), training_prose(), vocab_size)


def _train_tokenizer(code_documents: Sequence[Document], prose_documents: Sequence[Document], size: int) -> Tokenizer:
    """Trained on all of the prose and as much of the code."""
    room = sum(document.size for document in prose_documents)
    sample = [document.text for document in prose_documents]
    for document in code_documents:
        if document.size <= room:
            sample.append(document.text)
            room -= document.size
    return train_tokenizer(sample, size)


def _plain(block: str) -> str:
    """A paragraph on one line, without the marks of a list item and of inline markup."""
    text = re.sub(r"^(\*|\d+\.|\[\d+\]) ", "", " ".join(block.split()))
    return _MARKUP.sub(lambda match: "".join(filter(None, match.groups())), text)


def _is_running_text(paragraph: str) -> bool:
    """Whether a paragraph is sentences: ends like one, and is mostly made of words."""
    words = _WORD.findall(paragraph)
    is_other = "::=" in paragraph or ">>>" in paragraph or paragraph[-1:] not in set(".:;!?)")
    return not is_other and len(words) >= 6 and sum(map(len, words)) > 0.68 * len(paragraph)


def _shuffled(name: str) -> tuple[int, str]:
    """A sort key that orders names without regard to what they say."""
    return zlib.crc32(name.encode()), name
