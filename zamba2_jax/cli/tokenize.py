"""`zamba2 tokenize`: from texts to token files."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from zamba2_jax.cli.several import Several, values


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """Turn texts into token files to train on.

    Reads files of text (.txt, .md: a document each), JSON lines (.jsonl, .ndjson, .json: a document a line, or an entry
    of a list), compressed too (.gz, .zst), and parquet (.parquet: a document a row), and writes a directory of
    ArrayRecord shards with a manifest: all of it, or, on an error, nothing.
    """

    input: Annotated[Several[Path], tyro.conf.arg(metavar="PATH ...")]
    """Files, or directories of which all such files are read."""
    output: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """Directory to write, new or empty, local or the URL of one in an object store."""
    tokenizer: Annotated[str, tyro.conf.arg(metavar="PATH_OR_REPO")]
    """A tokenizer.json, a sentencepiece model, a directory that holds one, or a name on the Hugging Face hub."""
    processes: int = os.cpu_count() or 1
    """Processes that tokenize."""
    shard_tokens: int = 2**26
    """Tokens after which a shard is closed."""
    field: str = "text"
    """What holds the text in JSON lines and parquet."""
    bos: str | None = None
    """Text of the token before every document, "" for none; by default the tokenizer's, if it has one."""
    eos: str | None = None
    """Text of the token after every document, "" for none; by default the tokenizer's."""
    special_tokens: bool = False
    """Names of special tokens in a text become these tokens, in place of the text they are."""

    def run(self) -> int:
        """Tokenizes and prints what it wrote; returns 0.

        Raises:
            ValueError: an option is not valid, or a file is not what it should be.
            OSError: a file cannot be read or written.
        """
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        from zamba2_jax.data.sources import size_of, sources_at
        from zamba2_jax.data.tokenize import tokenize

        sources = [
            source
            for path in values(self.input)
            for source in sources_at(path, self.field, bos=self.bos, eos=self.eos, special_tokens=self.special_tokens)
        ]
        if not sources:
            raise ValueError("--input is empty: expected a file or a directory")
        console = Console(highlight=False)
        columns = (BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(compact=True))
        with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
            bar = bars.add_task("", total=sum(map(size_of, sources)))
            manifest = tokenize(
                sources,
                self.output,
                self.tokenizer,
                processes=self.processes,
                shard_tokens=self.shard_tokens,
                progress=lambda size: bars.advance(bar, size),
            )
        console.print(
            f"{manifest.documents:,} documents, {manifest.tokens:,} tokens in {len(manifest.shards):,} shards, "
            f"written to {self.output}",
            markup=False,
            soft_wrap=True,
        )
        return 0
