import dataclasses
import json
import pathlib
import re
import shutil

import pytest

from tests.generate.checkpoints import CONFIG
from zamba2_jax import Zamba2Config
from zamba2_jax.text.stream import TextStream
from zamba2_jax.text.tokenizer import load_tokenizer, stop_tokens
from zamba2_jax.text.vocabulary import save_tokenizer, train_tokenizer

RELEASED = Zamba2Config.preset("zamba2-1.2b")
TEXTS = (
    "Hello world",
    "  two spaces, and a space at the end ",
    "né 日本語 🎉\n\tx = 1\r\n\n",
    "<s>[INST] hi [/INST] there</s> and on",
    "def f(x):\n    return [i**2 for i in range(10)]  # 1234",
    "<|im_start|>user\nhi<|im_end|>\n",
    "▁",
)
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA = NAMES | {"tokenizer_class": "LlamaTokenizer"}
CHAT = {
    str(32000 + i): {"content": text, "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    for i, text in enumerate(("<|im_start|>", "<|im_end|>"))
} | {str(i): {"content": text, "special": True} for i, text in enumerate(("<unk>", "<s>", "</s>"))}
SETTINGS = {
    "legacy, with BOS": LLAMA | {"legacy": True, "add_bos_token": True},
    "no word of BOS": LLAMA,
    "with BOS and EOS": LLAMA | {"add_bos_token": True, "add_eos_token": True},
    "added tokens": LLAMA | {"add_bos_token": True, "added_tokens_decoder": CHAT, "eos_token": "<|im_end|>"},
    "a class without rules": NAMES | {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False},
}


@pytest.fixture(scope="module")
def sentencepiece_file():
    """The tokenizer of the released models."""
    pytest.importorskip("sentencepiece", reason="needs the extra sentencepiece, which is not installed")
    package = pytest.importorskip("mistral_common", reason="needs the extra sentencepiece, which is not installed")
    return pathlib.Path(package.__file__).parent / "data" / "tokenizer.model.v1"


@pytest.fixture(scope="module")
def json_file(sentencepiece_file, tmp_path_factory):
    """The same as tokenizer.json, with a token before every text."""
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    load_tokenizer(path.parent, RELEASED).backend.save(str(path))
    return path


def directory_with(path, file, settings):
    shutil.copy(file, path / ("tokenizer.json" if file.suffix == ".json" else "tokenizer.model"))
    (path / "config.json").write_text(json.dumps(RELEASED.to_hf()))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("file", ["json_file", "sentencepiece_file"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_ids_and_texts_are_those_of_transformers(tmp_path, request, file, settings):
    """But for runs of spaces, of which transformers makes what sentencepiece does not."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    if file == "sentencepiece_file" and settings["tokenizer_class"] != "LlamaTokenizer":
        settings = settings | {"tokenizer_class": "LlamaTokenizer"}
    directory = directory_with(tmp_path, request.getfixturevalue(file), settings)
    ours, theirs = load_tokenizer(directory, RELEASED), transformers.AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        if file == "sentencepiece_file" and "  " in text:
            continue
        tokens = ours.encode(text)
        assert tokens == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)
    assert ours.special_id("eos_token") == theirs.eos_token_id
    assert ours.special_id("bos_token") == theirs.bos_token_id


def test_a_directory_without_a_tokenizer_gets_that_of_the_released_models(sentencepiece_file, tmp_path):
    """Its ids are those of sentencepiece after BOS, but where a text begins with a space, which it does not double."""
    sentencepiece = pytest.importorskip("sentencepiece")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    ours = load_tokenizer(tmp_path, RELEASED)
    for text in (
        "Hello world",
        TEXTS[2],
        TEXTS[4],
        "a  b\nc    d   e",
        "ünïcode ✓",
        pathlib.Path(pathlib.__file__).read_text()[:4000],
    ):
        assert ours.encode(text) == [1, *oracle.encode(text)]
    assert [ours.special_id(name) for name in ("bos_token", "eos_token")] == [1, 2]


def test_streams_keep_the_spaces_between_words(sentencepiece_file, tmp_path):
    tokenizer = load_tokenizer(tmp_path, RELEASED)
    text = "The quick brown fox 日本 says  hi"
    tokens = tokenizer.encode(text)
    for cut in range(1, len(tokens)):
        stream = TextStream(tokenizer.decode, before=tokens[:cut])
        pieces = [stream.add(token) for token in tokens[cut:]]
        unfinished = tokenizer.decode(tokens[:cut]).rstrip("\N{REPLACEMENT CHARACTER}")
        assert unfinished + "".join(pieces) == text


@pytest.mark.parametrize("place", ["settings", "list", "file"])
def test_chats_are_written_as_transformers_writes_them(tmp_path, place):
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    template = (
        "{% for m in messages %}\n  {%- if m.role == 'odd' %}{{ raise_exception('no ' + m.role) }}{% endif %}\n"
        "{{ bos_token }}{{ m.role }}\n{{ m.content | trim }}{{ eos_token }}{{ m | tojson }}\n{% endfor %}\n"
        "{%- if add_generation_prompt %}{{ bos_token }}assistant{% endif %}"
    )
    save_tokenizer(train_tokenizer(["the cat and the hat " * 9], 270), tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(template)
    else:
        listed = [{"name": "other", "template": "x"}, {"name": "default", "template": template}]
        settings["chat_template"] = template if place == "settings" else listed
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    messages = [{"role": "system", "content": " é <b> "}, {"role": "user", "content": "<eos> {{ 1 }}"}]
    ours, theirs = load_tokenizer(tmp_path, CONFIG), transformers.AutoTokenizer.from_pretrained(tmp_path)
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.render(messages) == rendered
    assert ours.encode_chat(messages) == theirs.encode(rendered, add_special_tokens=False)
    with pytest.raises(ValueError, match="the chat template does not take this conversation: no odd"):
        ours.render([{"role": "odd", "content": ""}])


def test_a_chat_template_reaches_nothing_outside_the_conversation(tmp_path):
    save_tokenizer(train_tokenizer(["the cat and the hat " * 9], 270), tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(ValueError, match="the chat template does not take this conversation: access to attribute"):
        load_tokenizer(tmp_path, CONFIG).render([])
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        load_tokenizer(tmp_path, CONFIG).render([])


def test_texts_end_with_the_tokens_that_the_files_name(tmp_path):
    save_tokenizer(train_tokenizer(["the cat and the hat " * 9], 270), tmp_path)
    tokenizer = load_tokenizer(tmp_path, CONFIG)
    other = dataclasses.replace(CONFIG, eos_token_id=7)
    assert stop_tokens(tmp_path, CONFIG, None) == (2,)
    assert stop_tokens(tmp_path, other, tokenizer) == (2, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6, 300]}')
    assert stop_tokens(tmp_path, other, tokenizer) == (2, 5, 6)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=re.escape("generation_config.json holds list, expected an object")):
        stop_tokens(tmp_path, CONFIG, None)


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, FileNotFoundError, "has no tokenizer: expected tokenizer.json or tokenizer.model"),
        ({"tokenizer.json": "{"}, ValueError, "tokenizer.json is not a valid tokenizer"),
        ({"tokenizer_config.json": "{"}, ValueError, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer.model": "x"}, ValueError, "tokenizer.model is not a sentencepiece model"),
    ],
)
def test_files_that_are_missing_or_broken_are_named(tmp_path, files, error, message):
    if "tokenizer.model" in files:
        pytest.importorskip("sentencepiece", reason="needs the extra sentencepiece, which is not installed")
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=re.escape(message)):
        load_tokenizer(tmp_path, CONFIG)
