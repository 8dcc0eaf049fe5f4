"""What a document is framed by."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from zamba2_jax.text.tokenizer import Tokenizer


class Frame(NamedTuple):
    """Tokens before and after every document."""

    begin: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def size(self) -> int:
        """Tokens that a document takes beside its own."""
        return len(self.begin) + len(self.end)


def frame_of(tokenizer: Tokenizer, bos: str | None = None, eos: str | None = None) -> Frame:
    """The frame of a tokenizer's documents.

    A document begins with what the tokenizer puts before every text, as a prompt does; if that is nothing, with its
    bos_token; if it has none, with nothing. It ends with what the tokenizer puts after every text, or else with its
    eos_token, or else with the first token that ends a text by the configs beside it.

    Args:
        tokenizer: of the documents.
        bos: text of the tokens to begin with instead, "" for none.
        eos: text of the tokens to end with instead, "" for none.

    Raises:
        ValueError: nothing says how a document ends.
    """
    bare, framed = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    first = next((i for i in range(len(framed)) if bare and framed[i : i + len(bare)] == bare), 0)
    begin, end = framed[:first], framed[first + len(bare) :]
    if bos is not None:
        begin = tokenizer.encode(bos, add_special_tokens=False) if bos else []
    elif not begin and (id_ := tokenizer.special_id("bos_token")) is not None:
        begin = [id_]
    if eos is not None:
        return Frame(tuple(begin), tuple(tokenizer.encode(eos, add_special_tokens=False) if eos else ()))
    if not end:
        id_ = tokenizer.special_id("eos_token")
        end = [id_] if id_ is not None else list(tokenizer.stop_tokens[:1])
    if not end:
        raise ValueError(
            "the tokenizer names no eos_token: expected one in tokenizer_config.json beside it, or the option eos of "
            "the source, the text of a token or an empty one"
        )
    return Frame(tuple(begin), tuple(end))


def encode_documents(
    tokenizer: Tokenizer, texts: Sequence[str], frame: Frame, *, special_tokens: bool = False
) -> list[np.ndarray]:
    """The tokens of each text within its frame, int32.

    Args:
        tokenizer: to encode with.
        texts: the documents.
        frame: around each.
        special_tokens: whether names of special tokens in a text become these tokens; else they stay text.
    """
    rows = tokenizer.encode_batch(texts, special_tokens=special_tokens)
    return [np.array([*frame.begin, *ids, *frame.end], np.int32) for ids in rows]
