"""Against `transformers.AutoTokenizer`, whose ids are those of the ecosystem, on generated texts."""

import codecs
import functools
import json
import pathlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.kinds import ADDED, CONFIG, KINDS, SPECIAL, bpe, chatml, gpt2, mistral_file, write
from zamba2_jax.text.frame import encode_documents, frame_of
from zamba2_jax.text.stream import TextStream, byte_tokens, hidden_tokens
from zamba2_jax.text.tokenizer import load_tokenizer, stop_tokens
from zamba2_jax.text.vocabulary import copy_tokenizer, save_tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
pytest.importorskip("sentencepiece", reason="needs the extra sentencepiece, which is not installed")
pytest.importorskip("mistral_common", reason="needs the extra sentencepiece, which is not installed")

WORDS = (
    "the cat",
    " and",
    "  ",
    "\n\n",
    "\r\n\t",
    "don't",
    "日本",
    "é",
    "ﬁ²",
    "🎉",
    "▁",
    "x = 1",
    "<",
    "|>",
    "s>",
    "\ufeff",
)
TEXTS = st.lists(st.one_of(st.text(max_size=8), st.sampled_from((*WORDS, *SPECIAL))), max_size=9).map("".join)


@functools.cache
def generated_texts():
    """500 texts, the same for every kind: to generate them takes longer than to encode them."""
    texts = []

    @settings(max_examples=500, deadline=None, derandomize=True, database=None)
    @given(text=TEXTS)
    def collect(text):
        texts.append(text)

    collect()
    return texts


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    directory = KINDS[request.param](tmp_path_factory.mktemp("kind") / "model")
    return load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)


def test_ids_and_texts_are_those_of_transformers(pair):
    ours, theirs = pair
    for text in generated_texts():
        tokens = ours.encode(text)
        assert tokens == theirs.encode(text), repr(text)
        bare = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == bare, repr(text)
        assert ours.encode_batch([text], special_tokens=True) == [bare], repr(text)
        assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True), repr(text)


def streamed(tokenizer, tokens, stops=()):
    stream = TextStream(tokenizer.decode, stops, hidden=hidden_tokens(tokenizer), byte_tokens=byte_tokens(tokenizer))
    pieces = [stream.add(token) for token in tokens if not stream.stopped]
    assert "".join([*pieces, stream.end()]) == stream.text
    return stream, len(pieces)


def test_a_stream_gives_the_text_of_all_tokens(pair):
    """Of texts, and of tokens drawn at random, of which many are bytes and parts of characters."""
    ours, _ = pair
    rows = [ours.encode(text) for text in generated_texts()]
    of_bytes = [*byte_tokens(ours)] or ours.backend.encode("\ufffd\U0001f389é").ids
    spelled = [token for token in map(ours.backend.token_to_id, ("<0xEF>", "<0xBF>", "<0xBD>")) if token is not None]
    special, random = [*hidden_tokens(ours)], np.random.default_rng(0)
    for _ in range(1000):
        choices = ([*range(ours.vocab_size)], of_bytes, spelled or of_bytes, special or of_bytes)
        kinds = random.choice(4, size=random.integers(1, 12), p=(0.3, 0.4, 0.25, 0.05))
        rows.append([int(random.choice(choices[kind])) for kind in kinds])
    for tokens in rows:
        assert streamed(ours, tokens)[0].text == ours.decode(tokens), tokens


def test_a_stream_ends_with_the_first_token_that_completes_a_stop_string(pair):
    """Of texts without special tokens, in whose names stop strings are found too."""
    ours, _ = pair
    special = set(hidden_tokens(ours))
    for text in generated_texts()[::5]:
        tokens = [token for token in ours.encode(text) if token not in special]
        whole = ours.decode(tokens)
        ends = [ours.decode(tokens[: i + 1]) for i in range(len(tokens))]
        stops = {whole[at : at + size] for at in range(0, len(whole), 3) for size in (1, 2)}
        for stop in (stop for stop in stops if "\ufffd" not in stop):
            stream, added = streamed(ours, tokens, [stop])
            assert stream.stopped
            assert stream.text == whole[: whole.index(stop)]
            assert added <= next(i for i, text in enumerate(ends, 1) if stop in text)


def test_names_of_special_tokens_in_a_document_stay_text(pair):
    """The ids of a document are those of transformers, but where it makes a special token of plain text.

    Names of the unknown token are such a place: its unigram model fuses them with unknown text beside them, to bytes.
    """
    ours, theirs = pair
    unknown = theirs.unk_token or "\0"
    frame, special = frame_of(ours, eos=""), set(hidden_tokens(ours))
    rows = encode_documents(ours, generated_texts(), frame)
    for text, row in zip(generated_texts(), rows, strict=True):
        tokens = row[len(frame.begin) :].tolist()
        plain = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert tokens == plain or special & set(plain) or unknown in text, repr(text)
        assert not (special - {ours.special_id("unk_token")}) & set(tokens), repr(text)


def test_special_tokens_have_their_names(pair):
    ours, theirs = pair
    assert ours.special_tokens == theirs.special_tokens_map
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert ours.special_id(name) == getattr(theirs, f"{name}_id")


def test_a_directory_without_a_tokenizer_gets_that_of_the_released_models(tmp_path):
    """Its ids are those of sentencepiece after BOS, but where a text begins with a space, which it does not double."""
    import sentencepiece

    oracle = sentencepiece.SentencePieceProcessor(model_file=str(mistral_file()))
    ours = load_tokenizer(write(tmp_path))
    for text in (
        "Hello world",
        "né 日本語 🎉\n\tx = 1\r\n\n",
        "def f(x):\n    return [i**2 for i in range(10)]  # 1234",
        "a  b\nc    d   e",
        "ünïcode ✓",
        pathlib.Path(pathlib.__file__).read_text()[:4000],
    ):
        assert ours.encode(text) == [1, *oracle.encode(text)]
    assert [ours.special_id(name) for name in ("bos_token", "eos_token")] == [1, 2]
    # What is written for a run says all of it.
    (tmp_path / "copy").mkdir()
    copy_tokenizer(tmp_path, tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    assert again.encode("a    b </s> 日") == ours.encode("a    b </s> 日")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert theirs.encode("a    b </s> 日") == ours.encode("a    b </s> 日")


def test_a_file_stands_for_its_directory_and_a_copy_for_both(tmp_path):
    directory = bpe(tmp_path / "model")
    ours = load_tokenizer(directory)
    of_file = load_tokenizer(directory / "tokenizer.model")
    assert of_file.encode(" a<extra>b 日") == ours.encode(" a<extra>b 日")
    for i, source in enumerate((directory, directory / "tokenizer.model")):
        target = tmp_path / str(i)
        target.mkdir()
        copy_tokenizer(source, target)
        assert load_tokenizer(target).encode(" a<extra>b 日") == ours.encode(" a<extra>b 日")
        assert frame_of(load_tokenizer(target)) == frame_of(ours)


def test_a_hub_id_fetches_no_weights(tmp_path, monkeypatch):
    import huggingface_hub

    directory, asked = gpt2(tmp_path / "model"), []

    def download(repository, allow_patterns):
        asked.extend([repository, allow_patterns])
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_tokenizer("owner/name").encode("the") == load_tokenizer(directory).encode("the")
    files = ["model.safetensors", "tokenizer.json", "added_tokens.json", "config.json", "chat_template.jinja"]
    wanted = huggingface_hub.utils.filter_repo_objects(files, allow_patterns=asked[1])
    assert (asked[0], list(wanted)) == ("owner/name", files[1:])


def test_files_may_begin_with_a_byte_order_mark(tmp_path):
    directory = chatml(tmp_path)
    before = load_tokenizer(directory).encode("a<|im_end|>")
    for file in directory.iterdir():
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    (directory / "chat_template.jinja").write_bytes(codecs.BOM_UTF8 + b"{{ messages[0].content }}")
    assert load_tokenizer(directory).encode("a<|im_end|>") == before
    assert load_tokenizer(directory).render([{"role": "user", "content": "x"}]) == "x"


def test_texts_end_with_the_tokens_that_the_files_name(tmp_path):
    save_tokenizer(train_tokenizer(["the cat and the hat " * 9], 270), tmp_path)

    def ends():
        return stop_tokens(tmp_path), load_tokenizer(tmp_path).end_tokens

    assert ends() == ((), (2,))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7, "vocab_size": 270}))
    assert ends() == ((7,), (2, 7))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6, 300, null]}')
    assert ends() == ((5, 6), (2, 5, 6))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert ends() == ((7,), (2, 7))
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=re.escape("generation_config.json holds list, expected an object")):
        stop_tokens(tmp_path)


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, FileNotFoundError, "has no tokenizer: expected tokenizer.json or tokenizer.model"),
        ({"tokenizer.json": "{"}, ValueError, "tokenizer.json is not a valid tokenizer"),
        ({"tokenizer_config.json": "{"}, ValueError, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer.model": "x"}, ValueError, "tokenizer.model is not a sentencepiece model"),
        (
            {"tokenizer.model": "", "tokenizer_config.json": '{"tokenizer_class": "T5Tokenizer"}'},
            ValueError,
            "with tokenizer_class 'T5Tokenizer': expected LlamaTokenizer or none, or a tokenizer.json",
        ),
    ],
)
def test_files_that_are_missing_or_broken_are_named(tmp_path, files, error, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=re.escape(message)):
        load_tokenizer(tmp_path)


def test_added_tokens_that_would_get_other_ids_are_refused(tmp_path):
    directory = gpt2(tmp_path)
    (directory / "added_tokens.json").write_text('{"<extra>": 999}')
    with pytest.raises(ValueError, match="'<extra>' is named as token 999, but it would be 408"):
        load_tokenizer(directory)
    assert CONFIG["vocab_size"] == 32000  # and those of Mistral's vocabulary get the next ones
    assert min(id_ for id_ in map(int, ADDED) if id_ > 2) == 32000
