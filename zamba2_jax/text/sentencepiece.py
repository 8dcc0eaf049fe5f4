"""Sentencepiece models as parts of a tokenizer of the `tokenizers` library."""

from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken

_BPE, _UNIGRAM = 2, 1  # sentencepiece's names of its models
_CONTROL, _USER_DEFINED = 3, 4  # and of pieces that are no text


class SentencePiece(NamedTuple):
    """What a file tokenizer.model holds.

    Attributes:
        pieces: and their scores, in the order of their ids.
        unigram: whether it is a unigram model; else it is BPE.
        added: pieces that the text is cut at first: control tokens, which are special, and those defined by the user.
        unknown: the id of the piece for what no piece covers.
        byte_fallback: whether that is written as bytes instead.
        charsmap: of the normalizer, empty for none.
        names: the texts of bos_token, eos_token and unk_token, as far as there are any.
    """

    pieces: list[tuple[str, float]]
    unigram: bool
    added: list[AddedToken]
    unknown: int
    byte_fallback: bool
    charsmap: bytes
    names: dict[str, str]


def read_sentencepiece(path: Path) -> SentencePiece:
    """Reads a sentencepiece model.

    Raises:
        ValueError: it is not one, or neither BPE nor unigram, or sentencepiece is not installed.
    """
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
    except ImportError as error:
        raise ValueError(f"{path} needs sentencepiece[protobuf]: pip install 'zamba2-jax[sentencepiece]'") from error
    proto = ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path} is not a sentencepiece model: {error}") from error
    trainer = proto.trainer_spec
    if trainer.model_type not in (_BPE, _UNIGRAM):
        raise ValueError(f"{path} has model type {trainer.model_type}, expected BPE or unigram")
    if not proto.pieces:
        raise ValueError(f"{path} is not a sentencepiece model: it has no pieces")
    named = {
        "bos_token": (trainer.bos_id, trainer.bos_piece or "<s>"),
        "eos_token": (trainer.eos_id, trainer.eos_piece or "</s>"),
        "unk_token": (trainer.unk_id, trainer.unk_piece or "<unk>"),
    }
    return SentencePiece(
        pieces=[(piece.piece, piece.score) for piece in proto.pieces],
        unigram=trainer.model_type == _UNIGRAM,
        added=[
            AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
            for piece in proto.pieces
            if piece.type in (_CONTROL, _USER_DEFINED)
        ],
        unknown=trainer.unk_id,
        byte_fallback=trainer.byte_fallback,
        charsmap=proto.normalizer_spec.precompiled_charsmap,
        names={name: text for name, (number, text) in named.items() if number >= 0},
    )


def merges_by_id(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """All ways to make a piece of two others, those of the first pieces first: how transformers 5 orders them."""
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    return sorted(_halves(ids), key=lambda pair: (ids[pair[0] + pair[1]], len(pair[0]), len(pair[1])))


def merges_by_score(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """The same, those of the best pieces first: how sentencepiece orders them.

    The order is not that of the ids: Mistral's runs of spaces have low ids and the worst score.
    """
    scores = dict(pieces)
    return sorted(_halves(scores), key=lambda pair: -scores[pair[0] + pair[1]])


def _halves(pieces: dict[str, int] | dict[str, float]) -> list[tuple[str, str]]:
    halves = ((piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece)))
    return [pair for pair in halves if pair[0] in pieces and pair[1] in pieces]
