"""Tokens to text, piece by piece, up to a stop string."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

Decode = Callable[[Sequence[int]], str]


class Tokenizer(Protocol):
    """What is asked of a tokenizer: `tokenizers.Tokenizer` and those of `transformers` and sentencepiece have it."""

    def encode(self, text: str, /) -> Any:
        """Token ids, or an object that holds them as `ids`."""

    def decode(self, tokens: Sequence[int], /) -> str:
        """The text of some tokens."""


class TextStream:
    """The text of a growing row of tokens.

    All tokens are decoded anew for each one: what a token adds to a text depends on the tokens before it.

    Attributes:
        text: of the tokens so far, up to the first stop string.
        stopped: whether there was one.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = ()):
        self.text, self.stopped = "", False
        self._decode, self._stops = decode, stops
        self._tokens: list[int] = []
        self._given = 0

    def add(self, token: int) -> str:
        """The text that is certain now, and was not before: no half characters, no beginning of a stop string."""
        self._tokens.append(token)
        self.text = self._decode(self._tokens)
        found = [at for stop in self._stops if (at := self.text.find(stop)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
            return self.end()
        return self._give(self._certain())

    def end(self) -> str:
        """The rest of the text."""
        return self._give(len(self.text))

    def _give(self, end: int) -> str:
        piece = self.text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _certain(self) -> int:
        """How much of the text no later token changes."""
        begun = [n for stop in self._stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])]
        whole = self.text.rstrip("\N{REPLACEMENT CHARACTER}")  # what decoders write for part of a character
        return min(len(whole), len(self.text) - max(begun, default=0))
