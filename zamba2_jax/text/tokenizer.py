"""The tokenizer of a checkpoint, whatever file it comes in, and its chat template.

All forms become a `tokenizers.Tokenizer`, so that special tokens inside a text, added tokens and decoding work alike.
What a text becomes is what `transformers.AutoTokenizer` makes of the same directory, but for one thing: transformers 5
joins runs of spaces too early where there is only a sentencepiece model; here they are as in sentencepiece.
"""

import dataclasses
import datetime
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram

from zamba2_jax.checkpoint.hf import local_directory
from zamba2_jax.config import Zamba2Config

MISTRAL_VOCAB_SIZE = 32000
"""Of the released models, whose tokenizer is that of Mistral 7B v0.1."""

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_UNIGRAM, _BPE = 1, 2  # sentencepiece's names of its models
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # and of what is not text


@dataclasses.dataclass(frozen=True)
class CheckpointTokenizer:
    """Text to token ids and back.

    Attributes:
        backend: what does it.
        special_tokens: names that a chat template may use, as "bos_token", and their texts.
        chat_template: a Jinja template, or None.
    """

    backend: Tokenizer
    special_tokens: Mapping[str, str]
    chat_template: str | None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with what the checkpoint has put around every text: for most a token that begins it."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, without the special ones."""
        return self.backend.decode(tokens)

    def special_id(self, name: str) -> int | None:
        """The id of a special token by its name, as "eos_token"; None where there is none."""
        text = self.special_tokens.get(name)
        return None if text is None else self.backend.token_to_id(text)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation as the text that the model's next turn goes on from.

        Args:
            messages: a "role" and a "content" each.

        Raises:
            ValueError: there is no chat template, or it does not take these messages.
        """
        # Few commands need it, and it takes a tenth of a second.
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self.chat_template is None:
            raise ValueError("the tokenizer has no chat template: expected chat_template.jinja beside it, or one given")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )

        def refuse(message: str) -> NoReturn:
            raise TemplateError(message)

        environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            template = environment.from_string(self.chat_template)
            return template.render(messages=messages, add_generation_prompt=True, **self.special_tokens)
        except TemplateError as error:
            raise ValueError(f"the chat template does not take this conversation: {error}") from error

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of `render(messages)`, which writes all special tokens itself."""
        return self.encode(self.render(messages), add_special_tokens=False)


def load_tokenizer(source: str | os.PathLike[str], config: Zamba2Config | None = None) -> CheckpointTokenizer:
    """The tokenizer of a checkpoint.

    It is read from the directory: tokenizer.json, or tokenizer.model, a sentencepiece model, with what
    tokenizer_config.json, special_tokens_map.json and chat_template.jinja say. A directory without either gets the
    tokenizer of the released models, from the package mistral-common, if its vocabulary has their size. A sentencepiece
    model of which no tokenizer_config.json speaks puts BOS before every text, as the released models were trained.

    Args:
        source: a directory, or the id of a repository on the Hugging Face hub.
        config: of the model; that of the checkpoint by default.

    Raises:
        FileNotFoundError: there is no such checkpoint, or it has no tokenizer.
        ValueError: a file is not valid, or needs a package that is not installed.
    """
    directory = local_directory(source)
    config = Zamba2Config.from_hf(directory) if config is None else config
    settings = _settings(directory)
    file = directory / "tokenizer.json"
    if file.is_file():
        backend = _read_json(file, settings)
    else:
        file = _sentencepiece_model(directory, config)
        backend = _read_sentencepiece(file, settings)
    special = _special_tokens(backend, settings, config)
    _add_tokens(backend, settings, special, file)
    if file.name != "tokenizer.json":
        _begin_and_end(backend, settings, special)
    return CheckpointTokenizer(backend, special, _chat_template(directory, settings))


def stop_tokens(directory: Path, config: Zamba2Config, tokenizer: CheckpointTokenizer | None) -> tuple[int, ...]:
    """The ids that end a text, by generation_config.json or else the config, and by the tokenizer.

    Raises:
        ValueError: generation_config.json is not valid.
    """
    named = _load_json(directory / "generation_config.json").get("eos_token_id", config.eos_token_id)
    listed = named if isinstance(named, list) else [named]
    of_tokenizer = None if tokenizer is None else tokenizer.special_id("eos_token")
    ids = {i for i in (*listed, of_tokenizer) if isinstance(i, int) and 0 <= i < config.vocab_size}
    return tuple(sorted(ids))


def _settings(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, over special_tokens_map.json."""
    settings = _load_json(directory / "tokenizer_config.json") or {"add_bos_token": True, "legacy": True}
    return _load_json(directory / "special_tokens_map.json") | settings


def _load_json(path: Path) -> dict[str, Any]:
    """An object in a file; an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, expected an object")
    return content


def _read_json(path: Path, settings: dict[str, Any]) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower one
        raise ValueError(f"{path} is not a valid tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    named_llama = settings.get("tokenizer_class", "").removesuffix("Fast") == "LlamaTokenizer"
    if named_llama and not isinstance(tokenizer.decoder, decoders.ByteLevel):
        tokenizer.normalizer = None
        _mark_spaces(tokenizer, prefix=settings.get("add_prefix_space") is not False, legacy=settings.get("legacy"))
    return tokenizer


def _mark_spaces(tokenizer: Tokenizer, *, prefix: bool, legacy: bool | None) -> None:
    """Has spaces written as "▁", and with `prefix` one before a text that begins without.

    With `legacy` such a one also comes before what follows a special token.
    """
    scheme = "never" if not prefix else "always" if legacy else "first"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", left=1)] * prefix)


def _read_sentencepiece(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """A sentencepiece model, BPE or unigram, as a tokenizer of the `tokenizers` library."""
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
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type == _BPE:
        vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
        unknown = proto.pieces[trainer.unk_id].piece
        model: BPE | Unigram = BPE(
            vocab,
            _merges({piece.piece: piece.score for piece in proto.pieces}),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    elif trainer.model_type == _UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in proto.pieces]
        model = Unigram(scores, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    else:
        raise ValueError(f"{path} has model type {trainer.model_type}, expected BPE or unigram")
    tokenizer = Tokenizer(model)
    if normalizer.precompiled_charsmap:
        tokenizer.normalizer = normalizers.Precompiled(normalizer.precompiled_charsmap)
    _mark_spaces(tokenizer, prefix=normalizer.add_dummy_prefix, legacy=settings.get("legacy"))
    tokenizer.add_special_tokens([piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)])
    tokenizer.add_tokens([piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED])
    return tokenizer


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """All ways to make a piece of two others, those of the best piece first.

    The order is not that of the ids: Mistral's runs of spaces have low ids and the worst score.
    """
    ranked = sorted(scores, key=lambda piece: -scores[piece])
    halves = ((piece[:i], piece[i:]) for piece in ranked for i in range(1, len(piece)))
    return [pair for pair in halves if pair[0] in scores and pair[1] in scores]


def _sentencepiece_model(directory: Path, config: Zamba2Config) -> Path:
    """The directory's own model, or that of the released models."""
    own = directory / "tokenizer.model"
    if own.is_file():
        return own
    if config.vocab_size != MISTRAL_VOCAB_SIZE:
        raise FileNotFoundError(f"{directory} has no tokenizer: expected tokenizer.json or tokenizer.model")
    package = importlib.util.find_spec("mistral_common")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError(
            f"{directory} has no tokenizer: expected tokenizer.json or tokenizer.model, or the package mistral-common, "
            "which has that of the released models: pip install 'zamba2-jax[sentencepiece]'"
        )
    return Path(package.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"


def _special_tokens(backend: Tokenizer, settings: dict[str, Any], config: Zamba2Config) -> dict[str, str]:
    """The texts of the special tokens by name, as the files give them, or else as the config numbers them."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        number = getattr(config, f"{name}_id", None)
        if text is None and name not in settings and name in ("bos_token", "eos_token") and number is not None:
            text = backend.id_to_token(number)
        if text is not None:
            found[name] = text
    return found


def _add_tokens(backend: Tokenizer, settings: dict[str, Any], special: Mapping[str, str], source: Path) -> None:
    """Adds the tokens that stand in the settings alone, and makes the special ones known as such."""
    added = settings.get("added_tokens_decoder", {})
    for number, token in sorted(added.items(), key=lambda item: int(item[0])):
        text = token["content"]
        flags = {key: token[key] for key in _FLAGS if key in token}
        backend.add_tokens([AddedToken(text, **flags)])
        if backend.token_to_id(text) != int(number):
            raise ValueError(
                f"tokenizer_config.json has {text!r} as token {number}, but beside {source} it would be "
                f"{backend.token_to_id(text)}"
            )
    backend.add_special_tokens([text for text in special.values() if backend.token_to_id(text) is not None])


def _begin_and_end(backend: Tokenizer, settings: dict[str, Any], special: Mapping[str, str]) -> None:
    """Has a token put before or after every text where the settings say so."""
    names = [name for name in ("bos_token", "eos_token") if settings.get(f"add_{name}") and name in special]
    begin, end = ([special[name]] if name in names else [] for name in ("bos_token", "eos_token"))
    backend.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A", *end],
        pair=[*begin, "$A", *end, *begin, "$B", *end],
        special_tokens=[(special[name], backend.token_to_id(special[name])) for name in names],
    )


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    """The template in its own file, or in the settings: alone, or the one named "default" of a list."""
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template
