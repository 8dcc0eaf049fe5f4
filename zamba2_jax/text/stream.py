"""Tokens to text, piece by piece, up to a stop string."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

Decode = Callable[[Sequence[int]], str]

CONTEXT = 8
"""Tokens before a text that are decoded with it: more than a character has bytes."""

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for part of a character."""


@runtime_checkable
class Tokenizer(Protocol):
    """What is asked of a tokenizer: `tokenizers.Tokenizer` and those of `transformers` and sentencepiece have it."""

    def encode(self, text: str, /) -> Any:
        """Token ids, or an object that holds them as `ids`."""

    def decode(self, tokens: Sequence[int], /) -> str:
        """The text of some tokens."""


def token_lists(
    texts: Sequence[str] | Sequence[Sequence[int]], tokenizer: Tokenizer | None, name: str = "prompt"
) -> Sequence[Sequence[int]]:
    """Token ids of strings; token ids as they are.

    Args:
        texts: strings or token ids.
        tokenizer: for strings.
        name: of one of them in messages.

    Raises:
        ValueError: one string stands for many, a string is empty, strings and token ids are mixed, or strings come
            without a tokenizer.
    """
    if isinstance(texts, str):
        raise ValueError(f"{name}s={texts!r}: expected a list of them")
    strings = [text for text in texts if isinstance(text, str)]
    if not strings:
        return [text for text in texts if not isinstance(text, str)]
    if len(strings) < len(texts):
        raise ValueError(f"{name}s are strings and token ids: expected one of the two")
    if tokenizer is None:
        raise ValueError(f"{name}s are strings: expected a tokenizer")
    if "" in strings:
        raise ValueError(f"{name} {strings.index('')} is empty, expected text")
    encoded = [tokenizer.encode(text) for text in strings]
    return [getattr(tokens, "ids", tokens) for tokens in encoded]


class TextStream:
    """The text that a growing row of tokens adds to what stands before it.

    All tokens are decoded anew for each one, after a few of those before them: what a token adds to a text depends on
    its neighbours, and the space before a word is lost where it stands first.

    Attributes:
        text: of the tokens so far, up to the first stop string.
        stopped: whether there was one.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = (), before: Sequence[int] = ()):
        self.text, self.stopped = "", False
        self._decode, self._stops = decode, stops
        self._tokens = list(before[-CONTEXT:])
        # A character that the tokens before leave unfinished counts to the new text.
        self._start = len(decode(self._tokens).rstrip(UNFINISHED)) if self._tokens else 0
        self._given = 0

    def add(self, token: int) -> str:
        """The text that is certain now, and was not before: no half characters, no beginning of a stop string."""
        self._tokens.append(token)
        self.text = self._decode(self._tokens)[self._start :]
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
        whole = self.text.rstrip(UNFINISHED)
        return min(len(whole), len(self.text) - max(begun, default=0))
