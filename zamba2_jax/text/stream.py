"""Text to tokens, and tokens to text piece by piece, up to a stop string."""

import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import tokenizers

Decode = Callable[[Sequence[int]], str]

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for part of a character."""

LONGEST = 4
"""Bytes of the longest characters of UTF-8, and so most tokens that one is made of."""

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


def byte_tokens(tokenizer: TokenizerLike | None) -> Mapping[int, int]:
    """The tokens of single bytes, with these, that a tokenizer decodes by whole runs; none for most tokenizers.

    Those of Llama's kind spell what is not in their vocabulary so. A run that is not UTF-8 as a whole becomes U+FFFD
    for each of its bytes.
    """
    for name in ("backend", "backend_tokenizer"):  # of `text.tokenizer.Tokenizer`, and in transformers
        tokenizer = getattr(tokenizer, name, tokenizer)
    if not isinstance(tokenizer, tokenizers.Tokenizer) or tokenizer.decoder is None:
        return {}
    if tokenizer.decoder.decode(["<0x41>"]) != "A":
        return {}
    ids = {byte: tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    return {id_: byte for byte, id_ in ids.items() if id_ is not None}


_Letters = list[tuple[str, bool]]
"""Characters, and whether the text has them: those of hidden tokens are only searched for stop strings."""


class TextStream:
    """The text that a growing row of tokens adds to what stands before it.

    A token's text depends on its neighbours: several can be one character, and the space before a word is lost where it
    stands first. So a token is decoded together with those of the last text before it, and kept until no token that
    may follow changes its text. Then the pieces are the text of all tokens, whatever these are. The work is linear in
    the number of tokens.

    That takes `byte_tokens` for decoders that have such: of a run of them nothing is given before it ends, but a stop
    string in it is found at once. Without, characters of a run are given as they come, and stay though the run turns
    out not to be UTF-8.

    Attributes:
        stopped: whether there was a stop string.
    """

    def __init__(
        self,
        decode: Decode,
        stops: Sequence[str] = (),
        before: Sequence[int] = (),
        hidden: Mapping[int, str] | None = None,
        byte_tokens: Mapping[int, int] | None = None,
    ):
        """A stream without tokens.

        Args:
            decode: text of tokens.
            stops: the text ends before the first of these.
            before: tokens that it goes on from. A character that they leave unfinished counts to the new text.
            hidden: tokens that `decode` leaves out, with their texts: stop strings find them, the text is without them.
            byte_tokens: of single bytes, with these, that `decode` decodes by runs; see `byte_tokens`.
        """
        self.stopped = False
        self._stops, self._hidden, self._bytes = stops, hidden or {}, byte_tokens or {}
        self._parts: list[str] = []
        self._held: _Letters = []  # what may begin a stop string
        seen = [token for token in before if token not in self._hidden]
        self._decode = lambda tokens: decode(tokens) if tokens else ""
        self._context, self._pending = _split_before(self._decode, seen)
        self._base = self._decode(self._context)
        self._open = bool(self._pending)  # whether the next token may change the text of those that are pending
        self._run = _Run(self._bytes[token] for token in self._pending if token in self._bytes)

    @property
    def text(self) -> str:
        """What was given so far: after `end`, the text of all tokens, up to the first stop string."""
        return "".join(self._parts)

    def add(self, token: int) -> str:
        """The text that is certain now, and was not before: no half characters, no beginning of a stop string."""
        self._pending.append(token)
        if token not in self._hidden:
            self._open = token in self._bytes if self._bytes else self._is_unfinished()
        return "" if self._open and not self._ends_stop(token) else self._take(self._advance())

    def end(self) -> str:
        """The rest of the text."""
        piece = "" if self.stopped else self._take(self._advance())
        held, self._held = self._held, []
        return piece + self._give(held)

    def _is_unfinished(self) -> bool:
        """Whether the text ends with part of a character, or with U+FFFD itself, which looks alike."""
        if len(self._pending) <= LONGEST:
            return self._decode([*self._context, *self._pending]).endswith(UNFINISHED)
        return all(self._decode(self._pending[-n:]).endswith(UNFINISHED) for n in range(1, LONGEST + 1))

    def _ends_stop(self, token: int) -> bool:
        """Whether a stop string ends with this token, if it is the last one."""
        if not self._stops:
            return False
        if token in self._bytes:
            before = "".join(letter for letter, _ in self._held)
            if not self._run.add(self._bytes[token], before, self._stops):
                return False
        letters = self._letters() if token in self._bytes or len(self._pending) <= LONGEST else []
        while letters and token not in self._hidden and letters[-1] == (UNFINISHED, True):
            letters.pop()  # it may become another character
        return self._find([*self._held, *letters]) is not None

    def _letters(self) -> _Letters:
        """What the pending tokens add to the text if nothing follows, hidden ones in their places."""
        context, base = self._context, self._base
        text = self._decode([*context, *self._pending])
        if not text.startswith(base):  # broken bytes change characters before them, which were given already
            context, base, text = [], "", self._decode(self._pending)
        new = text[len(base) :]
        letters: _Letters = []
        given = 0
        for i, token in enumerate(self._pending):
            if token in self._hidden:
                shorter = self._decode([*context, *self._pending[:i]])[len(base) :]
                place = max(given, _common(shorter, new))
                letters += [(letter, True) for letter in new[given:place]]
                letters += [(letter, False) for letter in self._hidden[token]]
                given = place
        return letters + [(letter, True) for letter in new[given:]]

    def _advance(self) -> _Letters:
        """Moves on by the pending tokens; what they add."""
        if not self._pending:
            return []
        letters = self._letters()
        tokens = [token for token in self._pending if token not in self._hidden]
        self._pending, self._open, self._run = [], False, _Run()
        whole = [*self._context, *tokens]
        if any(shown for _, shown in letters):
            # The fewest of the last tokens that have text of their own: before a space alone there is to be some.
            size = len(tokens)
            while size < len(whole) and not self._decode(whole[-size:]):
                size *= 2
            self._context = whole[-size:]
        elif not self._base and self._decode(2 * tokens):
            self._context = whole  # a space that is not shown where it stands first
        self._base = self._decode(self._context)
        return letters

    def _take(self, letters: _Letters) -> str:
        """What can be given when these follow, of which stop strings may have begun or ended."""
        self._held += letters
        found = self._find(self._held)
        if found is not None:
            self.stopped = True
            given, self._held = self._held[:found], []
            return self._give(given)
        searched = "".join(letter for letter, _ in self._held)
        begun = [n for stop in self._stops for n in range(1, len(stop)) if searched.endswith(stop[:n])]
        end = len(self._held) - max(begun, default=0)
        given, self._held = self._held[:end], self._held[end:]
        return self._give(given)

    def _find(self, letters: _Letters) -> int | None:
        """Where the first stop string begins."""
        searched = "".join(letter for letter, _ in letters)
        return min((at for stop in self._stops if (at := searched.find(stop)) >= 0), default=None)

    def _give(self, letters: _Letters) -> str:
        piece = "".join(letter for letter, shown in letters if shown)
        self._parts.append(piece)
        return piece


def _common(text: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))


class _Run:
    """The bytes of a run as characters, as far as these are needed to see a stop string end."""

    def __init__(self, first: Iterable[int] = ()):
        self._decoder: codecs.IncrementalDecoder | None = codecs.getincrementaldecoder("utf-8")()
        self._tail = ""
        for byte in first:
            self.add(byte, "", ())

    def add(self, byte: int, before: str, stops: Sequence[str]) -> bool:
        """Whether a stop string seems to end with one more byte; `before` is the text before the run."""
        if self._decoder is None:
            return False
        try:
            letter = self._decoder.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._decoder = None  # the run is no text, and remains so
            return False
        self._tail = (self._tail + letter)[-max(map(len, stops), default=0) :]
        return bool(letter) and (before + self._tail).endswith(tuple(stops))


def _split_before(decode: Decode, tokens: list[int]) -> tuple[list[int], list[int]]:
    """Of the tokens before a text, the last ones that have text, and those of a character that is not finished."""
    whole, pending = decode(tokens), []
    if whole.endswith(UNFINISHED):
        for count in range(1, min(LONGEST - 1, len(tokens)) + 1):
            shorter = decode(tokens[:-count])
            if not shorter.endswith(UNFINISHED):
                tokens, pending, whole = tokens[:-count], tokens[-count:], shorter
                break
    for size in _TAILS:
        text = decode(tokens[-size:])
        if text and whole.endswith(text) and not text.startswith(UNFINISHED):
            return tokens[-size:], pending
    return tokens, pending
