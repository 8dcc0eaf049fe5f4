"""`zamba2 chat`: a conversation in the terminal."""

from __future__ import annotations

import dataclasses
import importlib.util
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from zamba2_jax.cli.options import ModelOptions
from zamba2_jax.files import read_text

if TYPE_CHECKING:
    from zamba2_jax.inference.chat import Conversation
    from zamba2_jax.inference.sampling import Sampling

HELP = "/new begins a new conversation, /quit or Ctrl-D ends; Ctrl-C breaks off an answer"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(ModelOptions):
    """Talk with a model.

    The checkpoint needs a chat template. Every turn takes in what is new, and goes on from the cache of the
    conversation.
    """

    system: str | None = None
    """A message that stands before the conversation, by the role "system"."""
    template: Path | None = None
    """File with a Jinja chat template, in place of that of the checkpoint."""
    special_tokens_as_text: bool = False
    """Names of special tokens in what you say stay text, in place of becoming these tokens."""
    max_new_tokens: int = 512
    """Most tokens of an answer."""

    def run(self) -> int:
        """Talks until the end of the input; returns 0.

        Raises:
            ValueError: an option or a file is not valid, or there is no chat template.
            OSError: a file is not there.
        """
        from zamba2_jax.inference.chat import Conversation

        sampling = self.sampling()
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens}: expected at least 1")
        checkpoint = self.open()
        tokenizer = checkpoint.tokenizer()
        if self.template is not None:
            tokenizer = dataclasses.replace(tokenizer, chat_template=read_text(self.template))
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        tokenizer.render([*before, {"role": "user", "content": "?"}])  # what it does not take, it says before the start
        conversation = Conversation(
            checkpoint.load(),
            tokenizer,
            stop_tokens=checkpoint.stop_tokens(tokenizer),
            system=self.system,
            capacity=self.capacity,
            special_tokens=not self.special_tokens_as_text,
        )
        if importlib.util.find_spec("readline"):
            importlib.import_module("readline")  # lets `input` edit lines and go back to earlier ones
        print(HELP)
        while (text := _read()) is not None:
            if text == "/new":
                conversation.restart()
            elif text.startswith("/"):
                print(HELP)
            elif text:
                try:
                    self._answer(conversation, text, sampling)
                except ValueError as error:
                    print(f"zamba2: {error}; /new begins a new conversation")
        return 0

    def _answer(self, conversation: Conversation, text: str, sampling: Sampling) -> None:
        """Prints the answer as it comes."""
        with _interrupts() as interrupted, closing(conversation.ask(text, self.max_new_tokens, sampling)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
                if interrupted():
                    break
        note = {"stop": "", "length": " [cut at its longest]", None: " [broken off]"}
        print(note[conversation.finish] + "\n")


def _read() -> str | None:
    """A line of the user without spaces around it; None at the end."""
    try:
        text = input("> ").strip()
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        return ""
    return None if text == "/quit" else text


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Takes Ctrl-C as a wish to stop, which the body asks for; the second one is a `KeyboardInterrupt`.

    An exception at any place would leave an engine without the arrays it has just given away.
    """
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
