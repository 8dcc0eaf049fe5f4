"""A byte-level BPE tokenizer, trained in seconds."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from zamba2_jax.files import write_atomically

PAD, BOS, EOS = 0, 1, 2
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
"""In the order of their ids, which are those of the published models."""

# What may stand beside tokenizer.json and say how it is used.
_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")

MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
"""Room for the special tokens and all bytes."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer whose vocabulary is the special tokens, the 256 bytes and the merges most frequent in `texts`.

    It adds no special token by itself; see `encode_documents`.

    Raises:
        ValueError: `vocab_size` has no room for the bytes, or the texts do not fill it.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size={vocab_size}: expected at least {MIN_VOCAB_SIZE}, the special tokens and all bytes"
        )
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the texts give {tokenizer.get_vocab_size()} tokens: expected vocab_size={vocab_size}")
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """The tokens of each text between BOS and EOS, int32."""
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array([BOS, *encoding.ids, EOS], np.int32) for encoding in encodings]


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of the directory it is in, as `parse_tokenizer` makes it.

    Raises:
        ValueError: it is no tokenizer, or the ids of BOS and EOS are not special tokens in it.
        OSError: there is none.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, expected a tokenizer.json or a directory that holds one")
    try:
        tokenizer = parse_tokenizer(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"{file} is no tokenizer.json: {error}") from error
    special = {id_: token.content for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    if not {BOS, EOS} <= set(special):
        raise ValueError(f"{file}: its special tokens are {special}: expected {BOS} and {EOS} to begin and end a text")
    return tokenizer


def parse_tokenizer(text: str) -> Tokenizer:
    """A tokenizer from its JSON that takes a text as it is: not cut, not padded, names of special tokens as text."""
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, from which `transformers.AutoTokenizer` builds the tokenizer."""
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL_TOKENS, strict=True))
    settings = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}, indent=2) + "\n"
    write_atomically(directory / "tokenizer.json", lambda path: tokenizer.save(str(path)))
    write_atomically(directory / "tokenizer_config.json", lambda path: path.write_text(settings, encoding="utf-8"))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a tokenizer.json, or the directory it is in, into a directory, with what stands beside it."""
    for pattern in _FILES:
        for file in filter(Path.is_file, (source if source.is_dir() else source.parent).glob(pattern)):
            shutil.copyfile(file, target / file.name)
    if source.is_file():
        shutil.copyfile(source, target / "tokenizer.json")
