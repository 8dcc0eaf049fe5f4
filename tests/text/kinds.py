"""Directories with small tokenizers of the kinds that checkpoints come with."""

import importlib.util
import io
import json
import pathlib

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from zamba2_jax import preset
from zamba2_jax.models.registry import config_json
from zamba2_jax.text.tokenizer import load_tokenizer

TEXT = (
    "the cat and the hat and the bat, the rat in the flat sat on the mat on which the dog had sat. "
    "def f(x):\n    return [i**2 for i in range(10)]  # 1234\n"
    "né à l'été, naïve œuvre; 日本語の文字 問題; наука и жизнь; 🎉🎊\n"
    "user says: don't  say   three    words!\n\n\tTabs, too.\r\n"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "<s>", "</s>", "<unk>", "<extra>", "[INST]")
CONFIG = config_json(preset("zamba2-1.2b"))


def write(path, settings=None, **files):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    if settings is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, content in files.items():
        file = path / {"json": "tokenizer.json", "model": "tokenizer.model", "added": "added_tokens.json"}[name]
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def byte_level(special, pre_tokenizer=None, normalizer=None):
    """As GPT-2 has it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT] * 3, trainer)
    return backend


def gpt2(path):
    backend = byte_level(["<|endoftext|>"])
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **names}
    return write(path, settings, json=json.loads(backend.to_str()))


def chatml(path, cls="Qwen2Tokenizer"):
    """Ids 0 <|endoftext|>, 1 <|im_start|>, 2 <|im_end|>, no bos, and a token that is added but not special."""
    words = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"""
    split = pre_tokenizers.Split(Regex(words + r"|\s+(?!\S)|\s+"), "isolated")
    both = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], both, normalizers.NFC())
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    settings = {"tokenizer_class": cls, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return write(path, settings, json=json.loads(backend.to_str()))


def fast(path):
    """As its tokenizer.json says, which adds a token before every text; two more tokens stand beside it."""
    backend = byte_level(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    number = backend.get_vocab_size()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<extra>"}
    return write(path, settings, json=json.loads(backend.to_str()), added={"<extra>": number, "[INST]": number + 1})


def sentencepiece_model(model_type, **options):
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 5),
        model_writer=written,
        model_type=model_type,
        vocab_size=420 if model_type == "bpe" else 330,
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    return written.getvalue()


def unigram(path):
    """Nothing beside the model."""
    return write(path, None, model=sentencepiece_model("unigram", user_defined_symbols=["<|im_start|>"]))


def bpe(path):
    """Nothing beside the model but added tokens; it normalises and has a piece of the user."""
    model = sentencepiece_model("bpe", user_defined_symbols=["<|im_start|>"], normalization_rule_name="nmt_nfkc")
    return write(path, None, model=model, added={"<extra>": 420})


def llama_model(path):
    """A bare model with the class's settings."""
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": True}
    return write(path, settings, model=sentencepiece_model("bpe"), added={"<extra>": 420, "<think>": 421})


def mistral_file():
    package = importlib.util.find_spec("mistral_common").submodule_search_locations[0]
    return pathlib.Path(package) / "data" / "tokenizer.model.v1"


ADDED = {
    str(32000 + i): {"content": text, "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    for i, text in enumerate(("<|im_start|>", "<|im_end|>"))
} | {str(i): {"content": text, "special": True} for i, text in enumerate(("<unk>", "<s>", "</s>"))}


def mistral(path, legacy=True):
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True}
    settings |= {"eos_token": "<|im_end|>", "added_tokens_decoder": ADDED}
    return write(path, settings, model=mistral_file().read_bytes())


def llama_json(path, **settings):
    """The released models' vocabulary as the older form of tokenizer.json."""
    backend = load_tokenizer(write(path)).backend
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    settings = {"tokenizer_class": "LlamaTokenizerFast", "added_tokens_decoder": ADDED, **settings}
    return write(path, settings, json=json.loads(backend.to_str()))


KINDS = {
    "gpt2": gpt2,
    "chatml": chatml,
    "chatml, as its file says": lambda path: chatml(path, "PreTrainedTokenizerFast"),
    "fast, added tokens": fast,
    "unigram model": unigram,
    "bpe model": bpe,
    "llama, bare model": llama_model,
    "mistral, bare model": mistral,
    "mistral, not legacy": lambda path: mistral(path, legacy=False),
    "llama, legacy json": lambda path: llama_json(path, legacy=True),
    "llama, json, no prefix": lambda path: llama_json(path, add_prefix_space=False),
    "llama, json, with prefix": lambda path: llama_json(path, add_prefix_space=True),
}
