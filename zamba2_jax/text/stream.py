"""Text to tokens, and tokens to text piece by piece, up to a stop string."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import tokenizers

Decode = Callable[[Sequence[int]], str]

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for part of a character."""

PENDING = 3
"""Most tokens of a character that is not finished: one byte less than the longest characters of UTF-8 have."""

LONGEST_PENDING = 32
"""Most tokens that are kept where each ends one character and begins the next."""

_TAILS = (4, 8, 16, 32, 64)  # how many tokens before a text stand for all of them, if they can


@runtime_checkable
class TokenizerLike(Protocol):
    """What is asked of a tokenizer: `tokenizers.Tokenizer` and those of `transformers` and sentencepiece have it."""

    def encode(self, text: str, /) -> Any:
        """Token ids, or an object that holds them as `ids`."""

    def decode(self, tokens: Sequence[int], /) -> str:
        """The text of some tokens."""


def token_lists(
    texts: Sequence[str] | Sequence[Sequence[int]], tokenizer: TokenizerLike | None, name: str = "prompt"
) -> Sequence[Sequence[int]]:
    """Token ids of strings; token ids as they are.

    Args:
        texts: strings or token ids.
        tokenizer: for strings.
        name: of one of them in messages.

    Raises:
        ValueError: one string stands for many, a string has no tokens or is not Unicode, strings and token ids are
            mixed, or strings come without a tokenizer.
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
    for i, text in enumerate(strings):
        if has_lone_surrogate(text):
            raise ValueError(f"{name} {i} is {text[:60]!r}, with half of a surrogate pair: expected text")
    encoded = [tokenizer.encode(text) for text in strings]
    rows = [getattr(tokens, "ids", tokens) for tokens in encoded]
    for i, row in enumerate(rows):
        if not len(row):
            raise ValueError(f"{name} {i} is empty, expected text")
    return rows


def has_lone_surrogate(text: str) -> bool:
    r"""Whether a string holds half of a surrogate pair, as JSON's "\ud800" does: that is no text, and no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def hidden_tokens(tokenizer: TokenizerLike | None) -> Mapping[int, str]:
    """The tokens that a tokenizer's `decode` leaves out, with their texts, as far as they are known."""
    backend = getattr(tokenizer, "backend", tokenizer)
    if not isinstance(backend, tokenizers.Tokenizer):
        return {}
    return {id_: token.content for id_, token in backend.get_added_tokens_decoder().items() if token.special}


class TextStream:
    """The text that a growing row of tokens adds to what stands before it.

    A token's text depends on its neighbours: several can be one character, and the space before a word is lost where it
    stands first. So a token is decoded together with those of the last text before it, and kept until its characters
    are whole. These are a bounded number of tokens: the work is linear in the length of the text.

    Where bytes that are no UTF-8 stand beside whole characters, some decoders give up the characters too when they
    decode all of it at once; here they stay. A character U+FFFD spelled in tokens of single bytes looks like such
    bytes, and characters that follow it in such tokens may be given as U+FFFD.

    Attributes:
        stopped: whether there was a stop string.
    """

    def __init__(
        self,
        decode: Decode,
        stops: Sequence[str] = (),
        before: Sequence[int] = (),
        hidden: Mapping[int, str] | None = None,
    ):
        """A stream without tokens.

        Args:
            decode: text of tokens.
            stops: the text ends before the first of these.
            before: tokens that it goes on from. A character that they leave unfinished counts to the new text.
            hidden: tokens that `decode` leaves out, with their texts: stop strings find them, the text is without them.
        """
        self.stopped = False
        self._decode, self._stops, self._hidden = decode, stops, hidden or {}
        self._parts: list[str] = []
        self._held: list[tuple[str, bool]] = []  # characters that may begin a stop string, and whether text has them
        seen = [token for token in before if token not in self._hidden]
        self._decode = lambda tokens: decode(tokens) if tokens else ""
        self._context, self._pending = _split_before(self._decode, seen)
        self._base = self._decode(self._context)

    @property
    def text(self) -> str:
        """What was given so far: after `end`, the text of all tokens, up to the first stop string."""
        return "".join(self._parts)

    def add(self, token: int) -> str:
        """The text that is certain now, and was not before: no half characters, no beginning of a stop string."""
        if token in self._hidden:
            rest = self._take(self._rest())
            return rest if self.stopped else rest + self._take(self._hidden[token], shown=False)
        self._pending.append(token)
        text = self._decode([*self._context, *self._pending])
        if not text.endswith(UNFINISHED):
            return self._take(self._advance(text, len(self._pending)))
        overdue = len(self._pending) - PENDING
        if overdue <= 0 or self._is_whole(text):
            return ""
        counts = [overdue]
        if text[len(self._base) :].count(UNFINISHED) < len(self._pending):
            # Not each token is a byte that is no character: three may be U+FFFD, which looks like one unfinished.
            counts.append(len(self._pending) - 1)
        texts = {n: self._decode([*self._context, *self._pending[:n]]) for n in counts}
        count = min(texts, key=lambda n: (texts[n].count(UNFINISHED), -n))
        return self._take(self._advance(texts[count], count))

    def end(self) -> str:
        """The rest of the text."""
        piece = "" if self.stopped else self._take(self._rest())
        held, self._held = self._held, []
        return piece + self._give(held)

    def _is_whole(self, text: str) -> bool:
        """Whether all but the end of the pending text is whole characters.

        A token may end one character and begin the next, and so leave no token after which all are whole.
        """
        whole = text[len(self._base) :].rstrip(UNFINISHED)
        return bool(whole) and UNFINISHED not in whole and len(self._pending) <= LONGEST_PENDING

    def _rest(self) -> str:
        """The text of tokens that no character was made of."""
        if not self._pending:
            return ""
        return self._advance(self._decode([*self._context, *self._pending]), len(self._pending))

    def _advance(self, text: str, count: int) -> str:
        """Moves on by some of the pending tokens; `text` is that of the context and these. What they add to it."""
        tokens, self._pending = self._pending[:count], self._pending[count:]
        # Broken bytes change what whole characters before them are decoded to: those were given already.
        new = text[len(self._base) :] if text.startswith(self._base) else self._decode(tokens)
        whole = [*self._context, *tokens]
        if new:
            # The fewest of the last tokens that have text of their own: before a space alone there is to be some.
            size = len(tokens)
            while size < len(whole) and not self._decode(whole[-size:]):
                size *= 2
            self._context = whole[-size:]
        elif not self._base and self._decode(2 * tokens):
            self._context = whole  # a space that is not shown where it stands first
        self._base = self._decode(self._context)
        return new

    def _take(self, text: str, shown: bool = True) -> str:
        """What can be given when this text follows, of which stop strings may have begun or ended."""
        self._held += ((letter, shown) for letter in text)
        searched = "".join(letter for letter, _ in self._held)
        found = [at for stop in self._stops if (at := searched.find(stop)) >= 0]
        if found:
            self.stopped = True
            given, self._held = self._held[: min(found)], []
            return self._give(given)
        begun = [n for stop in self._stops for n in range(1, len(stop)) if searched.endswith(stop[:n])]
        end = len(self._held) - max(begun, default=0)
        given, self._held = self._held[:end], self._held[end:]
        return self._give(given)

    def _give(self, letters: Sequence[tuple[str, bool]]) -> str:
        piece = "".join(letter for letter, shown in letters if shown)
        self._parts.append(piece)
        return piece


def _split_before(decode: Decode, tokens: list[int]) -> tuple[list[int], list[int]]:
    """Of the tokens before a text, the last ones that have text, and those of a character that is not finished."""
    whole, pending = decode(tokens), []
    if whole.endswith(UNFINISHED):
        for count in range(1, min(PENDING, len(tokens)) + 1):
            shorter = decode(tokens[:-count])
            if not shorter.endswith(UNFINISHED):
                tokens, pending, whole = tokens[:-count], tokens[-count:], shorter
                break
    for size in _TAILS:
        text = decode(tokens[-size:])
        if text and whole.endswith(text) and not text.startswith(UNFINISHED):
            return tokens[-size:], pending
    return tokens, pending
