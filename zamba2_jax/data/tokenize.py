"""From texts to token files, in parallel."""

import collections
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zamba2_jax.data.sources import Progress, SourceConfig, Text, chunks, read_texts
from zamba2_jax.data.token_files import MANIFEST, Manifest, write_token_files
from zamba2_jax.storage.local import check_new, write_directory
from zamba2_jax.text.frame import Frame, encode_documents, frame_of
from zamba2_jax.text.tokenizer import Tokenizer, load_tokenizer
from zamba2_jax.text.vocabulary import copy_tokenizer

AHEAD = 4
"""Chunks of text in flight per process, which bounds memory."""

_tokenizer: Tokenizer | None = None
"""Of a worker process; set by `_start`."""


def tokenize(
    sources: Sequence[SourceConfig],
    output: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str],
    *,
    processes: int,
    shard_tokens: int,
    progress: Progress,
) -> Manifest:
    """Writes the tokens of all texts to a new directory, complete or not at all.

    Documents keep their order, so that the files do not depend on `processes`. These are spawned: a script that calls
    this needs its `if __name__ == "__main__":`.

    Args:
        sources: of texts.
        output: directory to write, local or the URL of one in an object store, which is filled on
            this machine first, and there its manifest last.
        tokenizer: to tokenise with, as for `load_tokenizer`; it is copied beside the tokens.
        processes: that tokenise; reading and writing take one more.
        shard_tokens: as in `write_token_files`.
        progress: is told of the bytes of text as they are written.

    Raises:
        ValueError: a number is below 1, or as `read_texts` and `load_tokenizer`.
        OSError: `output` is in use, or a file cannot be read or written.
    """
    for name, value in (("processes", processes), ("shard_tokens", shard_tokens)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected an integer >= 1")
    check_new(output)
    loaded = load_tokenizer(tokenizer)
    framed = [(source, frame_of(loaded, source.bos, source.eos)) for source in sources]
    text_bytes = 0

    def counted(texts: Iterable[Text]) -> Iterator[Text]:
        nonlocal text_bytes
        for text in texts:
            text_bytes += len(text.text.encode())
            yield text

    tasks = (
        _Task(texts, frame, source.special_tokens)
        for source, frame in framed
        for texts in chunks(counted(read_texts(source)))
    )

    def write(directory: Path) -> Manifest:
        executor = ProcessPoolExecutor(processes, get_context("spawn"), _start, (loaded,))
        try:
            documents = _encoded(executor, tasks, AHEAD * processes, progress)
            manifest = write_token_files(
                directory, documents, loaded.backend, shard_tokens=shard_tokens, text_bytes=lambda: text_bytes
            )
        finally:
            executor.shutdown(cancel_futures=True)
        copy_tokenizer(tokenizer, directory)
        return manifest

    return write_directory(output, write, last=MANIFEST)


class _Task(NamedTuple):
    """Texts to tokenize together, and how."""

    texts: list[Text]
    frame: Frame
    special_tokens: bool


def _encoded(
    executor: ProcessPoolExecutor, tasks: Iterator[_Task], ahead: int, progress: Progress
) -> Iterator[np.ndarray]:
    """The tokens of every text in order, of which a bounded number is in flight."""
    waiting: collections.deque[tuple[Future[list[np.ndarray]], int]] = collections.deque()

    def submit(more: Iterable[_Task]) -> None:
        for texts, frame, special_tokens in more:
            future = executor.submit(_encode, [text.text for text in texts], frame, special_tokens)
            waiting.append((future, sum(text.size for text in texts)))

    submit(islice(tasks, ahead))
    while waiting:
        future, size = waiting.popleft()
        yield from future.result()
        progress(size)
        submit(islice(tasks, 1))


def _start(tokenizer: Tokenizer) -> None:
    """Prepares a worker.

    The processes are the parallelism: the tokenizer's own threads would be in their way. An interrupt from the terminal
    reaches every process; the one that writes ends the others.
    """
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = tokenizer


def _encode(texts: Sequence[str], frame: Frame, special_tokens: bool) -> list[np.ndarray]:
    assert _tokenizer is not None
    return encode_documents(_tokenizer, texts, frame, special_tokens=special_tokens)
