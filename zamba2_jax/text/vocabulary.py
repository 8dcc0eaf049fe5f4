"""A byte-level BPE tokenizer, trained in seconds; and tokenizers on disk."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from zamba2_jax.checkpoint.hub import local_directory
from zamba2_jax.files import write_atomically
from zamba2_jax.storage.local import local_copy
from zamba2_jax.text.tokenizer import FILES, Tokenizer, load_tokenizer

PAD, BOS, EOS = 0, 1, 2
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
"""Of `train_tokenizer`, in the order of their ids, which are those of the published models."""

MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
"""Room for the special tokens and all bytes."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer whose vocabulary is the special tokens, the 256 bytes and the merges most frequent in `texts`.

    It puts BOS before every text.

    Raises:
        ValueError: `vocab_size` has no room for the bytes, or the texts do not fill it.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size={vocab_size}: expected at least {MIN_VOCAB_SIZE}, the special tokens and all bytes"
        )
    backend = tokenizers.Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() != vocab_size:
        raise ValueError(f"the texts give {backend.get_vocab_size()} tokens: expected vocab_size={vocab_size}")
    begin = SPECIAL_TOKENS[BOS]
    backend.post_processor = TemplateProcessing(
        single=[begin, "$A"], pair=[begin, "$A", begin, "$B"], special_tokens=[(begin, BOS)]
    )
    return Tokenizer(backend, dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL_TOKENS, strict=True)))


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, from which `transformers.AutoTokenizer` builds the tokenizer."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_tokens}
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    text = json.dumps(settings, indent=2) + "\n"
    write_atomically(directory / "tokenizer.json", lambda path: tokenizer.backend.save(str(path)))
    write_atomically(directory / "tokenizer_config.json", lambda path: path.write_text(text, encoding="utf-8"))


def copy_tokenizer(source: str | os.PathLike[str], target: Path) -> None:
    """Puts the tokenizer that `load_tokenizer` reads into a directory: its files as they are, if they say all of it.

    Where tokenizer_config.json is not among them it is written anew, with what the model's config says of it.
    """
    source = local_copy(source, FILES)
    path = Path(source)
    directory = path.parent if path.is_file() else local_directory(source, FILES)
    if (path.is_file() and path.suffix == ".model") or not (directory / "tokenizer_config.json").is_file():
        save_tokenizer(load_tokenizer(source), target)
        return
    for file in (file for pattern in FILES for file in directory.glob(pattern)):
        if file.is_file() and file.name != "config.json":
            shutil.copyfile(file, target / file.name)
    if path.is_file():
        shutil.copyfile(path, target / "tokenizer.json")
