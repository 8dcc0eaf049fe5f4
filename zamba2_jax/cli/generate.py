"""`zamba2 generate`: prompts in, continuations out."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from zamba2_jax.cli.options import Checkpoint, ModelOptions
from zamba2_jax.cli.several import Several, values
from zamba2_jax.storage.local import growing_file, local_copy

if TYPE_CHECKING:
    from zamba2_jax.inference.jobs import Job
    from zamba2_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(ModelOptions):
    """Continue prompts with a model.

    Prompts come with --prompt, or from --input as JSON lines: {"prompt": "..."}, {"tokens": [...]}, or, for the chat
    template, {"messages": [{"role": "user", "content": "..."}]}; and where a line needs it "id", "max_new_tokens",
    "stop", "temperature", "top_k", "top_p", "min_p", "repetition_penalty" or "seed". Prompt i has the seed after --seed
    by i. Results are text for --prompt, and else JSON lines with the ids, as they are done, which need not be the order
    of the prompts.
    """

    prompt: Annotated[Several[str], tyro.conf.arg(metavar="TEXT ...")] = ()
    """What the model is to continue."""
    input: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """File of prompts in JSON lines, local or the URL of one in an object store; - is standard input."""
    output: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """New file for results in JSON lines, local or in an object store; standard output by default."""
    resume: bool = False
    """Go on with the output of a job that was broken off: prompts whose results are there are left out. A job of
    another model or other settings is refused."""
    stream: bool = False
    """Print every token of a --prompt as it comes, one prompt after the other."""
    max_new_tokens: int = 128
    """Most tokens to add."""
    stop: Annotated[Several[str], tyro.conf.arg(metavar="TEXT ...")] = ()
    """A continuation ends before the first of these."""
    special_tokens_as_text: bool = False
    """Names of special tokens within "messages" stay text, in place of becoming these tokens."""
    ignore_eos: bool = False
    """Go on after the token that ends a text."""
    logprobs: bool = False
    """Also give the natural log-probability of every token, in JSON lines."""
    slots: int = 8
    """Most prompts that run at a time."""

    def run(self) -> int:
        """Continues the prompts; returns 0, or 130 if it was interrupted.

        Raises:
            ValueError: an option, a prompt or a file is not valid.
            OSError: a file is not there, or cannot be read or written.
        """
        self._check()
        checkpoint = self.open()
        tokenizer = self._tokenizer(checkpoint)
        jobs = self._jobs(checkpoint, tokenizer)
        if self._prompts and self.output is None:
            self._print(checkpoint, jobs, tokenizer)
            return 0
        if self.output is None:
            return self._write(None, checkpoint, jobs, tokenizer)
        from zamba2_jax.inference.jobs import settings_name

        with growing_file(self.output, settings_name(os.path.basename(self.output))) as output:
            return self._write(output, checkpoint, jobs, tokenizer)

    @property
    def _prompts(self) -> tuple[str, ...]:
        return values(self.prompt)

    def _check(self) -> None:
        """Checks what concerns the options alone."""
        self.sampling()
        if bool(self._prompts) == (self.input is not None):
            raise ValueError("expected one of --prompt and --input")
        if self.stream and (not self._prompts or self.output is not None):
            raise ValueError("--stream needs --prompt, and no --output")
        if self.resume and self.output is None:
            raise ValueError("--resume needs --output")
        if self.logprobs and self._prompts and self.output is None:
            raise ValueError("--logprobs needs --output, or prompts from --input")
        if self.slots < 1:
            raise ValueError(f"--slots {self.slots}: expected at least 1")

    def _tokenizer(self, checkpoint: Checkpoint) -> Tokenizer | None:
        """The tokenizer, which token ids in a file can do without."""
        try:
            return checkpoint.tokenizer()
        except FileNotFoundError:
            if self._prompts or values(self.stop):
                raise
            return None

    def _jobs(self, checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> list[Job]:
        from zamba2_jax.inference.engine import Request
        from zamba2_jax.inference.jobs import make_job, read_jobs

        ends = () if self.ignore_eos else checkpoint.stop_tokens(tokenizer)
        defaults = Request((), self.max_new_tokens, self.sampling(), ends, values(self.stop))
        vocab_size = checkpoint.config.vocab_size
        if self._prompts:
            lines = ({"prompt": prompt} for prompt in self._prompts)
            return [make_job(line, i, defaults, tokenizer, vocab_size, self.capacity) for i, line in enumerate(lines)]

        def read(lines: Iterable[bytes]) -> list[Job]:
            return read_jobs(
                lines,
                defaults,
                tokenizer=tokenizer,
                vocab_size=vocab_size,
                capacity=self.capacity,
                special_tokens=not self.special_tokens_as_text,
            )

        assert self.input is not None
        if self.input == "-":
            return read(sys.stdin.buffer)
        with Path(local_copy(self.input, ())).open("rb") as file:
            return read(file)

    def _print(self, checkpoint: Checkpoint, jobs: list[Job], tokenizer: Tokenizer | None) -> None:
        """Prints each prompt with its continuation, in the order of the prompts."""
        from zamba2_jax.inference.engine import Token
        from zamba2_jax.inference.jobs import make_engine, run_jobs

        bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")

        def show(text: str) -> None:
            print(text, end="", flush=True)

        slots = 1 if self.stream else self.slots
        engine = make_engine(checkpoint.load(), jobs, tokenizer=tokenizer, slots=slots, capacity=self.capacity)
        texts = {} if self.stream else {job.id: done.text for job, done in run_jobs(engine, jobs)}
        for i, job in enumerate(jobs):
            show("\n" * (i > 0) + f"{bold}{job.prompt}{plain}")
            if self.stream:
                engine.submit(job.request)
                for event in engine.events():
                    if isinstance(event, Token):
                        show(event.text)
            else:
                show(texts[job.id])
            show("\n")

    def _settings(self, checkpoint: Checkpoint, jobs: list[Job], tokenizer: Tokenizer | None) -> dict[str, Any]:
        """What the results depend on."""
        from zamba2_jax.checkpoint.hf import fingerprint
        from zamba2_jax.inference.jobs import settings_of

        texts = None if tokenizer is None else hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()
        return settings_of(
            jobs,
            model={"name": self.model, "fingerprint": fingerprint(checkpoint.directory)},
            dtype=checkpoint.compute_dtype(),
            tokenizer=None if texts is None else {"fingerprint": texts},
            max_new_tokens=self.max_new_tokens,
            **dataclasses.asdict(self.sampling()),
            stop=values(self.stop),
            stop_tokens=() if self.ignore_eos else checkpoint.stop_tokens(tokenizer),
            special_tokens_as_text=self.special_tokens_as_text,
            logprobs=self.logprobs,
        )

    def _write(self, output: Path | None, checkpoint: Checkpoint, jobs: list[Job], tokenizer: Tokenizer | None) -> int:
        """Writes results as they are done, to a file of this machine or to standard output."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        from zamba2_jax.inference.jobs import (
            check_settings,
            find_results,
            make_engine,
            open_results,
            result,
            run_jobs,
            write_result,
        )

        finished: set[str | int] = set()
        if output is not None:
            finished = find_results(output, jobs, resume=self.resume, name=self.output)
            check_settings(output, self._settings(checkpoint, jobs, tokenizer), finished)
        left = [job for job in jobs if job.id not in finished]
        console = Console(stderr=True)
        visible = console.is_terminal and (self.output is not None or not sys.stdout.isatty())
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        try:
            if left:
                engine = make_engine(
                    checkpoint.load(), jobs, tokenizer=tokenizer, slots=self.slots, capacity=self.capacity
                )
                with (
                    nullcontext(sys.stdout.buffer) if output is None else open_results(output) as file,
                    Progress(*columns, console=console, disable=not visible) as progress,
                ):
                    bar = progress.add_task("", total=len(jobs), completed=len(finished))
                    for job, done in run_jobs(engine, left):
                        write_result(file, result(job, done, text=tokenizer is not None, logprobs=self.logprobs))
                        finished.add(job.id)
                        progress.advance(bar)
        except KeyboardInterrupt:
            advice = "" if self.output is None else ": the same command with --resume goes on"
            print(f"zamba2: interrupted, {len(finished)} of {len(jobs)} prompts are done{advice}", file=sys.stderr)
            return 130
        if self.output is not None:
            print(f"{len(jobs)} results in {self.output}", file=sys.stderr)
        return 0
