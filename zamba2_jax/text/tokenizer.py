"""A tokenizer, whatever files it comes in: for training, generation, scores and chat alike.

All forms become a `tokenizers.Tokenizer`. What a text becomes is what `transformers.AutoTokenizer` makes of the same
directory: what follows are the rules of transformers 5, by which it reads the files.
"""

import dataclasses
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from zamba2_jax.checkpoint.hub import local_directory
from zamba2_jax.files import read_json, read_text
from zamba2_jax.storage.local import local_copy
from zamba2_jax.storage.remote import RemoteDirectory, is_remote
from zamba2_jax.text.chat import mark, render, split_marked
from zamba2_jax.text.sentencepiece import SentencePiece, merges_by_id, merges_by_score, read_sentencepiece

MISTRAL_VOCAB_SIZE = 32000
"""Of the released models, whose tokenizer is that of Mistral 7B v0.1."""

FILES = (
    "tokenizer*",
    "added_tokens.json",
    "special_tokens_map.json",
    "*.jinja",
    "config.json",
    "generation_config.json",
)
"""What may say what a tokenizer is, as patterns."""

_NAMES_OF_FILES = ("tokenizer.json", "tokenizer.model")
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DEFAULT_NAMES = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "GPTNeoXTokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    | {"pad_token": "<|padding|>"},
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
}
"""Of the classes that make their tokenizer of the vocabulary and merges alone, by rules of their own."""

_SENTENCEPIECE = (None, "LlamaTokenizer", "PreTrainedTokenizer", "TokenizersBackend")
"""Classes whose rules for a bare sentencepiece model are known here."""

_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
        backend: what does it.
        special_tokens: the texts of special tokens by their names, as "bos_token": those a chat template may use.
        chat_template: a Jinja template, or None.
        stop_tokens: ids that end a text by the checkpoint's own files, generation_config.json or else config.json.
    """

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chat_template: str | None = None
    stop_tokens: tuple[int, ...] = ()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with what the tokenizer puts around every text: for most a token that begins it.

        Names of special tokens in the text become these tokens, as in transformers; see `encode_batch`.
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], *, special_tokens: bool = False) -> list[list[int]]:
        """Token ids of texts, with nothing around them, in parallel.

        Args:
            texts: strings.
            special_tokens: whether names of special tokens become these tokens; else they stay the text they are.
        """
        backend = self.backend if special_tokens else self._plain
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, without the special ones."""
        return self.backend.decode(tokens)

    def special_id(self, name: str) -> int | None:
        """The id of a special token by its name, as "eos_token"; None where there is none."""
        text = self.special_tokens.get(name)
        return None if text is None else self.backend.token_to_id(text)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The ids that end a text: the tokenizer's eos_token, and `stop_tokens`."""
        eos = self.special_id("eos_token")
        return tuple(sorted({*self.stop_tokens, *([] if eos is None else [eos])}))

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.backend.get_vocab().values(), default=-1)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """A conversation as the text that the model's next turn goes on from.

        Args:
            messages: a "role" and a "content" each.

        Raises:
            ValueError: there is no chat template, or it does not take these messages.
        """
        return render(self.chat_template, messages, self.special_tokens)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, special_tokens: bool = True) -> list[int]:
        """Token ids of `render(messages)`, which writes all special tokens itself.

        Args:
            messages: a "role" and a "content" each.
            special_tokens: whether names of special tokens within messages become these tokens, as in transformers;
                else they stay text, as with its `sanitize_control_tokens`.

        Raises:
            ValueError: as `render`.
        """
        if special_tokens or self.chat_template is None:
            return self.encode(self.render(messages), add_special_tokens=False)
        added = {token.content: token.special for token in self.backend.get_added_tokens_decoder().values()}
        parts = split_marked(self.render(mark(self.chat_template, messages, added)), added)
        ids = [self._encode_part(part, as_text, first=i == 0) for i, (part, as_text) in enumerate(parts)]
        return [id_ for part in ids for id_ in part]

    def _encode_part(self, text: str, as_text: bool, first: bool) -> list[int]:
        """Token ids of part of a text; after a newline, so that no space is put before what is not the first part."""

        def encode(text: str) -> list[int]:
            return self._without_added_tokens(text) if as_text else self.encode(text, add_special_tokens=False)

        newline = self.encode("\n", add_special_tokens=False)
        ids = [] if first and not as_text else encode(f"\n{text}")
        return ids[len(newline) :] if newline and ids[: len(newline)] == newline else encode(text)

    def _without_added_tokens(self, text: str) -> list[int]:
        """Token ids that the model makes of a text, in which no added token is looked for."""
        plain = self._plain
        if plain.normalizer is not None:
            text = plain.normalizer.normalize_str(text)
        words = [text] if plain.pre_tokenizer is None else [w for w, _ in plain.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in plain.model.tokenize(word)]

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The backend that takes names of special tokens for the text they are.

        The models of some tokenizers have these tokens among their pieces. There the names are cut after their first
        character, before the model sees them.
        """
        plain = tokenizers.Tokenizer.from_str(self.backend.to_str())
        plain.encode_special_tokens = True
        special = {t.content: id_ for id_, t in plain.get_added_tokens_decoder().items() if t.special}
        found = [
            name
            for name, id_ in special.items()
            if len(name) > 1 and id_ in plain.encode(f"{name}x{name}", add_special_tokens=False).ids
        ]
        if found:
            cut = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in found)
            split = pre_tokenizers.Split(Regex(cut), "isolated")
            before = [] if plain.pre_tokenizer is None else [plain.pre_tokenizer]
            plain.pre_tokenizer = pre_tokenizers.Sequence([*before, split])
        return plain


def load_tokenizer(source: str | os.PathLike[str]) -> Tokenizer:
    """A tokenizer from its files.

    These are tokenizer.json, or tokenizer.model, a sentencepiece model, and what tokenizer_config.json,
    added_tokens.json, special_tokens_map.json, chat_template.jinja and the model's own configs say beside it. A
    checkpoint without either gets the tokenizer of the released models, from the package mistral-common, if its
    config.json says that its vocabulary has their size; that puts BOS before every text, as they were trained.

    Args:
        source: a directory or one of these two files, on this machine or by their URL in an object store; or the id of
            a repository on the Hugging Face hub. No weights are fetched.

    Raises:
        FileNotFoundError: there is no such file, directory or repository, or no tokenizer in it.
        ValueError: a file is not valid, or needs a package that is not installed.
    """
    source = local_copy(source, FILES)
    path = Path(source)
    directory = path.parent if path.is_file() else local_directory(source, FILES)
    settings, model = (_object(directory / name) for name in ("tokenizer_config.json", "config.json"))
    file = path if path.is_file() else next(filter(Path.is_file, map(directory.joinpath, _NAMES_OF_FILES)), None)
    reader = _Reader(
        directory, settings | {"tokenizer_class": settings.get("tokenizer_class", model.get("tokenizer_class"))}
    )
    if file is None:
        backend = reader.released(model.get("vocab_size"))
    elif file.suffix == ".json":
        backend = reader.json(file)
    else:
        backend = reader.sentencepiece(file)
    return Tokenizer(backend, reader.names, _chat_template(directory, settings), stop_tokens(directory))


def has_tokenizer(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory, local or in an object store, holds a tokenizer.

    Raises:
        OSError: the store refuses, or cannot be reached.
    """
    if is_remote(directory):
        return not set(_NAMES_OF_FILES).isdisjoint(RemoteDirectory(os.fspath(directory)).sizes())
    return any((Path(directory) / name).is_file() for name in _NAMES_OF_FILES)


def stop_tokens(directory: Path) -> tuple[int, ...]:
    """The ids that end a text by a checkpoint's generation_config.json, or else its config.json.

    Raises:
        ValueError: a file is not valid.
    """
    config = _object(directory / "config.json")
    named = _object(directory / "generation_config.json").get("eos_token_id")
    named = config.get("eos_token_id") if named is None else named
    listed = named if isinstance(named, list) else [named]
    most = config.get("vocab_size", float("inf"))
    return tuple(sorted({i for i in listed if isinstance(i, int) and 0 <= i < most}))


class _Reader:
    """Reads the tokenizer of a directory as transformers 5 does.

    Attributes:
        names: the texts of the special tokens by name, once it has been read.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]):
        self.names: dict[str, str] = {}
        self._directory = directory
        self._class = (settings.get("tokenizer_class") or "").removesuffix("Fast") or None
        # Names that are no standard ones, as "image_token", are special tokens too.
        own = {name: value for name, value in settings.items() if name.endswith("_token") and isinstance(value, str)}
        extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
        if isinstance(extra, dict):
            own, extra = own | extra, []
        self._settings = settings
        self._special: dict[str, Any] = {name: settings[name] for name in _NAMES if name in settings} | own
        self._extra = list(extra)

    def json(self, file: Path) -> tokenizers.Tokenizer:
        """A tokenizer.json."""
        text = read_text(file)
        try:
            content, backend = json.loads(text), tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises no narrower one
            raise ValueError(f"{file} is not a valid tokenizer: {error}") from error
        added = self._added([(token["id"], token) for token in content.get("added_tokens") or []])
        if backend.padding is not None:
            self._special.setdefault("pad_token", backend.padding["pad_token"])
        backend.no_truncation()
        backend.no_padding()
        if self._class in _DEFAULT_NAMES and not (self._class == "LlamaTokenizer" and '"ByteLevel"' in text):
            after = backend.post_processor
            backend = self._rebuilt(content["model"].get("vocab", {}), content["model"].get("merges") or [])
            if self._class != "GPTNeoXTokenizer" and after is not None:
                backend.post_processor = after
        return self._finished(backend, added, file)

    def sentencepiece(self, file: Path) -> tokenizers.Tokenizer:
        """A sentencepiece model with nothing but settings beside it."""
        if self._class not in _SENTENCEPIECE:
            raise ValueError(
                f"{file} with tokenizer_class {self._class!r}: expected LlamaTokenizer or none, or a tokenizer.json"
            )
        model = read_sentencepiece(file)
        added = self._added([])
        self._extra = self._extra or list(model.added)
        if self._class == "LlamaTokenizer":
            backend = self._rebuilt({piece: i for i, (piece, _) in enumerate(model.pieces)}, merges_by_id(model.pieces))
        else:
            backend = _plain_sentencepiece(model, {id_: token.content for id_, token in added.items()})
            self._special = model.names | self._special
        return self._finished(backend, added, file)

    def released(self, vocab_size: int | None) -> tokenizers.Tokenizer:
        """The tokenizer of the released models, as they were trained."""
        package = importlib.util.find_spec("mistral_common") if vocab_size == MISTRAL_VOCAB_SIZE else None
        if package is None or not package.submodule_search_locations:
            also = ", or the package mistral-common, which has that of the released models: "
            also += "pip install 'zamba2-jax[sentencepiece]'"
            raise FileNotFoundError(
                f"{self._directory} has no tokenizer: expected {' or '.join(_NAMES_OF_FILES)}"
                f"{also if vocab_size == MISTRAL_VOCAB_SIZE else ''}"
            )
        file = Path(package.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"
        model = read_sentencepiece(file)
        self._class, self._settings = "LlamaTokenizer", {"legacy": True, "add_bos_token": True}
        self._special, self._extra = {}, list(model.added)
        vocabulary = {piece: i for i, (piece, _) in enumerate(model.pieces)}
        return self._finished(self._rebuilt(vocabulary, merges_by_score(model.pieces)), {}, file)

    def _added(self, of_file: Iterable[tuple[int, dict[str, Any]]]) -> dict[int, AddedToken]:
        """Tokens that are found in a text before all others, by id, as the files beside the tokenizer list them."""
        added: dict[int, AddedToken] = {}
        if "added_tokens_decoder" in self._settings:
            added = {int(id_): _token(value) for id_, value in self._settings["added_tokens_decoder"].items()}
        else:
            named = _object(self._directory / "special_tokens_map.json")
            extra = named.pop("extra_special_tokens", None) or named.pop("additional_special_tokens", None) or []
            self._special |= {name: _token(value, special=True) for name, value in named.items() if value is not None}
            self._extra = self._extra or [_token(value, special=True) for value in extra]
            special = {_text(value) for value in (*self._special.values(), *self._extra) if value is not None}
            for text, id_ in _object(self._directory / "added_tokens.json").items():
                added[id_] = AddedToken(text, normalized=text not in special, special=text in special)
            added |= {id_: _token(token) for id_, token in of_file}
        by_text = {token.content: token for token in added.values()}
        for name, value in self._special.items():
            if value is not None:
                self._special[name] = by_text.get(_text(value), value)
        return added

    def _rebuilt(self, vocabulary: Any, merges: Sequence[Any]) -> tokenizers.Tokenizer:
        """What a class makes of a vocabulary and merges."""
        if isinstance(vocabulary, list):
            vocabulary = {entry[0] if isinstance(entry, list) else entry: i for i, entry in enumerate(vocabulary)}
        pairs: Any = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
        prefix = self._settings.get("add_prefix_space")
        if self._class == "LlamaTokenizer":
            backend = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, fuse_unk=True, byte_fallback=True))
            prefix = True if prefix is None else prefix
            scheme = "never" if not prefix else "always" if self._settings.get("legacy") else "first"
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
            steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", left=1)] * bool(prefix))
            return backend
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, pairs))
        backend.decoder = decoders.ByteLevel()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix))
        if self._class != "GPT2Tokenizer":
            backend.normalizer = normalizers.NFC()
        if self._class == "Qwen2Tokenizer":
            words = pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated")
            bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix), use_regex=False)
            backend.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
        return backend

    def _finished(
        self, backend: tokenizers.Tokenizer, added: Mapping[int, AddedToken], file: Path
    ) -> tokenizers.Tokenizer:
        """The tokenizer with the tokens that the files beside it add, and what it puts around a text."""
        self._special = _DEFAULT_NAMES.get(self._class or "", {}) | self._special
        special = {name: value for name, value in self._special.items() if value is not None}
        self.names = {name: _text(value) for name, value in special.items()}
        known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
        new = [token for _, token in sorted(added.items(), key=lambda item: item[0]) if repr(token) not in known]
        there = {token.content for token in (*backend.get_added_tokens_decoder().values(), *new)}
        for value in (*special.values(), *self._extra):
            if _text(value) not in there:
                new.append(_token(value, special=True) if isinstance(value, str | dict) else value)
                there.add(_text(value))
        for token in new:
            token.special = token.special or token.content in self.names.values()
        backend.add_tokens(new)
        for id_, token in added.items():
            found = backend.token_to_id(token.content)
            if found != id_:
                raise ValueError(f"beside {file} {token.content!r} is named as token {id_}, but it would be {found}")
        backend.encode_special_tokens = bool(self._settings.get("split_special_tokens"))
        says = file.suffix != ".json" and ("add_bos_token" in self._settings or "add_eos_token" in self._settings)
        if says or backend.post_processor is None:
            names = [name for name in ("bos_token", "eos_token") if file.suffix != ".json" and self._adds(name)]
            begin, end = ([self.names[name]] if name in names else [] for name in ("bos_token", "eos_token"))
            backend.post_processor = processors.TemplateProcessing(
                single=[*begin, "$A", *end],
                pair=[*begin, "$A", *end, *begin, "$B", *end],
                special_tokens=[(self.names[name], backend.token_to_id(self.names[name])) for name in names],
            )
        return backend

    def _adds(self, name: str) -> bool:
        return bool(self._settings.get(f"add_{name}")) and name in self.names


def _plain_sentencepiece(model: SentencePiece, renamed: Mapping[int, str]) -> tokenizers.Tokenizer:
    """A sentencepiece model for which no class speaks; BPE pieces may be given other names."""
    if model.unigram:
        kind: models.Model = models.Unigram(model.pieces, unk_id=model.unknown, byte_fallback=model.byte_fallback)
    else:
        vocabulary = {piece: i for i, (piece, _) in enumerate(model.pieces)}
        for id_, name in renamed.items():
            if id_ < len(model.pieces) and name not in vocabulary:
                del vocabulary[model.pieces[id_][0]]
                vocabulary[name] = id_
        kind = models.BPE(
            vocabulary,
            merges_by_id(model.pieces),
            unk_token=model.names.get("unk_token"),
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    backend = tokenizers.Tokenizer(kind)
    spaces = normalizers.Replace(" ", "▁")
    charsmap = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    backend.normalizer = normalizers.Sequence([*charsmap, spaces])
    steps = [decoders.Replace("▁", " ")]
    backend.decoder = decoders.Sequence(
        [*steps, decoders.ByteFallback(), decoders.Fuse()] if model.byte_fallback else steps
    )
    return backend


def _token(value: Any, special: bool = False) -> AddedToken:
    """An added token as files write it: a text, or an object with "content" and flags."""
    if isinstance(value, AddedToken):
        return value
    if isinstance(value, str):
        return AddedToken(value, special=special)
    flags = {key: value[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special") if key in value}
    return AddedToken(value["content"], **(flags | {"special": True} if special else flags))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else value["content"] if isinstance(value, dict) else value.content


def _object(path: Path) -> dict[str, Any]:
    """An object in a file; an empty one where there is no file."""
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, expected an object")
    return content


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    """The template in its own file, or in the settings: alone, or the one named "default" of a list."""
    if (directory / "chat_template.jinja").is_file():
        return read_text(directory / "chat_template.jinja")
    template = settings.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template
