"""`zamba2 inspect`: which parts of a trained model its predictions need."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from zamba2_jax.cli.options import Checkpoint, Dtype
from zamba2_jax.cli.output import check_json_option, table_console
from zamba2_jax.cli.several import Several, values
from zamba2_jax.files import write_json
from zamba2_jax.models.registry import read_config

if TYPE_CHECKING:
    from zamba2_jax.data.batches import Batch
    from zamba2_jax.data.documents import Documents

HELD_OUT = "embedded"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
    """Say which parts of a model its predictions need.

    Prints what the loss on a text rises by when a part is silenced: a call's attention made uniform, its adapters at 0,
    its MLP's or its whole output at the mean over the tokens, a mixer at its mean, a layer skipped. A part that costs
    nothing is one that the model does without. Numbers within two standard errors of 0 are dim.
    """

    model: Annotated[str, tyro.conf.arg(metavar="DIR_OR_REPO")]
    """Directory of a checkpoint, or its name on the Hugging Face hub."""
    data: Annotated[str, tyro.conf.arg(metavar="FILE|embedded")] = HELD_OUT
    """Text that the model has not seen: a file or a directory of .txt, .md, .jsonl or .parquet files, or a directory
    that `zamba2 tokenize` wrote; "embedded" is the held-out prose of the embedded corpus, "code" the code of it."""
    seq: int = 128
    """Tokens per row."""
    rows: int = 64
    """Most rows to read."""
    batch: int = 16
    """Rows at a time; a mean is over the tokens of so many."""
    select: Annotated[Several[str], tyro.conf.arg(metavar="PATTERN ...")] = ()
    """Only parts of these names, as "*.mixer" or "all.*"; all by default."""
    dtype: Dtype = "auto"
    """What to compute in: "stored" is the dtype of the files; "auto" is float32 on CPU, else as stored."""
    json: Path | None = None
    """Also write the numbers to this file."""
    picture: Path | None = None
    """Also draw them: a PNG."""

    def run(self) -> int:
        """Measures and prints; returns 0.

        Raises:
            ValueError: an option, the text or the checkpoint is not valid.
            OSError: the checkpoint or the text is not there.
        """
        from zamba2_jax.checkpoint.hf import find_entries, local_directory
        from zamba2_jax.evaluate import necessity

        for name, least in (("seq", 2), ("rows", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: expected an integer >= {least}")
        check_json_option(self.json)
        if self.picture is not None and not self.picture.parent.is_dir():
            raise ValueError(f"--picture {self.picture}: there is no directory {self.picture.parent}")
        directory = local_directory(self.model)
        checkpoint = Checkpoint(directory, read_config(directory), self.dtype)
        find_entries(directory)
        batches = self._batches(checkpoint)
        console = table_console()
        with console.status("silencing one part after the other"):
            found = necessity(checkpoint.load(), batches, select=values(self.select) or ("*",))
        console.print(found.table())
        if self.json is not None:
            write_json(self.json, found.as_dict())
        if self.picture is not None:
            found.plot(self.picture)
        return 0

    def _batches(self, checkpoint: Checkpoint) -> list[Batch]:
        """The first rows of the text."""
        from zamba2_jax.data.batches import held_out
        from zamba2_jax.data.documents import in_memory

        documents = self._documents(checkpoint)
        ends = itertools.accumulate(map(len, documents))
        enough = next((i for i, end in enumerate(ends, 1) if end >= self.rows * self.seq), len(documents))
        first = in_memory(documents[i] for i in range(enough))
        rows = min(self.rows, -(-first.tokens // self.seq))
        size = min(self.batch, rows)
        return held_out(first, batch_size=size, length=self.seq)[: -(-rows // size)]

    def _documents(self, checkpoint: Checkpoint) -> Documents:
        from zamba2_jax.data.documents import in_memory
        from zamba2_jax.data.sources import EMBEDDED, SourceConfig, open_documents, sources_at
        from zamba2_jax.data.token_files import MANIFEST

        path, vocab_size = Path(self.data), checkpoint.config.vocab_size
        if (path / MANIFEST).is_file():
            return open_documents(SourceConfig(kind="tokens", path=self.data), None, vocab_size=vocab_size)
        tokenizer = checkpoint.tokenizer()
        if self.data == HELD_OUT:
            sources = [SourceConfig(kind="held_out_prose")]
        elif self.data in EMBEDDED:
            sources = [SourceConfig(kind=self.data)]  # type: ignore[arg-type]
        else:
            sources = sources_at(path)
        return in_memory(
            document for source in sources for document in open_documents(source, tokenizer, vocab_size=vocab_size)
        )
