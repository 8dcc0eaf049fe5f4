import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from zamba2_jax.text.vocabulary import BOS, EOS, train_tokenizer
from zamba2_jax.train import sources
from zamba2_jax.train.corpus import prose, training_prose
from zamba2_jax.train.sources import SourceConfig, open_documents, size_of, sources_at

TEXTS = ["the cat and the hat", "déjà vu,\nthe bat \U0001f600", "and the rat"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat and the hat and the bat " * 3], 270)


def write_text(path, texts):
    path.mkdir()
    for i, text in enumerate(texts):
        (path / f"{i}.{'txt' if i else 'md'}").write_text(text, encoding="utf-8")


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({"id": 7, field: text}) + "\n" for text in texts), encoding="utf-8")


def write_parquet(path, texts, field="text"):
    table = pyarrow.table({"id": list(range(len(texts))), field: texts})
    parquet.write_table(table, path, row_group_size=2)


def texts_of(documents, tokenizer):
    assert all(tokens[0] == BOS and tokens[-1] == EOS and tokens.dtype == np.int32 for tokens in documents)
    return [tokenizer.decode(tokens[1:-1].tolist()) for tokens in documents]


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_documents_are_the_texts_of_the_files(tokenizer, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sources, "CHUNK", 25)
    monkeypatch.setattr(sources, "ROWS_PER_READ", 2)
    path = tmp_path / f"data.{kind}"
    {"text": write_text, "jsonl": write_jsonl, "parquet": write_parquet}[kind](path, TEXTS)
    config, done = SourceConfig(kind=kind, path=str(path)), []
    documents = open_documents(config, tokenizer, vocab_size=270, progress=done.append)
    assert texts_of(documents, tokenizer) == TEXTS
    assert documents.tokens == sum(map(len, documents))
    assert len(done) == 2
    assert sum(done) == size_of(config)


def test_a_directory_is_read_in_order_and_empty_texts_are_left_out(tokenizer, tmp_path):
    (tmp_path / "b").mkdir()
    write_jsonl(tmp_path / "b" / "1.jsonl", ["one", "", "two"], field="body")
    write_jsonl(tmp_path / "a.jsonl", ["zero"], field="body")
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("\n")
    write_parquet(tmp_path / "c.parquet", ["three"], field="body")
    (tmp_path / "README").write_text("no text")
    found = sources_at(tmp_path, "body")
    assert found == [SourceConfig(kind=kind, path=str(tmp_path), field="body") for kind in ("jsonl", "parquet")]
    texts = [texts_of(open_documents(config, tokenizer, vocab_size=270), tokenizer) for config in found]
    assert texts == [["zero", "one", "two"], ["three"]]
    assert sources_at(tmp_path / "a.jsonl") == [SourceConfig(kind="jsonl", path=str(tmp_path / "a.jsonl"))]


def test_embedded_prose_leaves_out_what_is_held_out(tokenizer):
    documents = open_documents(SourceConfig(kind="prose"), tokenizer, vocab_size=270)
    assert texts_of(documents, tokenizer) == [document.text for document in training_prose()]
    assert len(documents) < len(prose())


def write_latin(path):
    path.write_bytes(b"first\nsecond\xff\n")


BAD_FILES = {
    "a.txt": [
        (write_latin, r"a\.txt, line 2: not UTF-8: byte 0xff at 12"),
        (lambda path: path.touch(), r"a\.txt: no text in it"),
        (lambda path: None, r"a\.txt: no such file"),
    ],
    "a.jsonl": [
        (lambda path: path.touch(), r"a\.jsonl: no text in it"),
        (lambda path: path.write_text('{"text": "x"}\n{"text": "y"'), r"a\.jsonl, line 2: not JSON"),
        (
            lambda path: path.write_text('{"text": "x"}\n\n{"body": "y"}'),
            r"line 3: .* named 'text', not \{'body': 'y'\}",
        ),
        (lambda path: path.write_text('{"text": 5}'), r"line 1: expected an object with a text"),
        (lambda path: path.write_text("[1]"), r"line 1: .*not \[1\]"),
        (lambda path: path.write_bytes(b'{"text": "x"}\n{"text": "\xff"}'), r"a\.jsonl, line 2: not UTF-8"),
    ],
    "a.parquet": [
        (lambda path: path.write_text("text"), r"a\.parquet: not a parquet file"),
        (lambda path: path.touch(), r"a\.parquet: not a parquet file"),
        (lambda path: write_parquet(path, ["x"], field="body"), r"a\.parquet: no column 'text', .* id, body"),
        (lambda path: write_parquet(path, ["x", "y", None]), r"a\.parquet, row 2: .* not None"),
        (lambda path: write_parquet(path, []), r"a\.parquet: no text in it"),
    ],
}


@pytest.mark.parametrize(("name", "write", "message"), [(name, *bad) for name in BAD_FILES for bad in BAD_FILES[name]])
def test_bad_files(tokenizer, tmp_path, name, write, message):
    path = tmp_path / name
    write(path)
    kind = sources.SUFFIXES[path.suffix]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_documents(SourceConfig(kind=kind, path=str(path)), tokenizer, vocab_size=270)


def test_tokens_outside_the_vocabulary_are_named(tokenizer, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["x", "the"])
    (the,) = tokenizer.encode("the").ids
    with pytest.raises(
        ValueError, match=rf"a\.jsonl, line 2: token id {the} is outside the vocabulary of {the} tokens"
    ):
        open_documents(SourceConfig(kind="jsonl", path=str(tmp_path)), tokenizer, vocab_size=the)


def test_more_text_than_fits_is_refused_unread(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"\xff" * 2**20)
    monkeypatch.setattr(sources, "MAX_IN_MEMORY", 2**20 - 1)
    with pytest.raises(ValueError, match=r"1 MB of text, expected at most 1 .*`zamba2 tokenize`"):
        open_documents(SourceConfig(kind="text", path=str(tmp_path)), tokenizer, vocab_size=270)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "csv", "path": "x"}, "kind='csv': expected one of text, jsonl"),
        ({"kind": "text"}, "kind='text' with path=None: expected a file or a directory"),
        ({"kind": "prose", "path": "x"}, "kind='prose' with path='x': expected none"),
    ],
)
def test_bad_configs(arguments, message):
    with pytest.raises(ValueError, match=message):
        SourceConfig(**arguments)


def test_nothing_to_read(tokenizer, tmp_path):
    (tmp_path / "a.csv").touch()
    for path in (tmp_path, tmp_path / "a.csv"):
        with pytest.raises(ValueError, match=r"no texts there, expected files named \*\.txt, \*\.md"):
            sources_at(path)
    with pytest.raises(ValueError, match=r"no jsonl in it, expected files named \*\.jsonl"):
        open_documents(SourceConfig(kind="jsonl", path=str(tmp_path)), tokenizer, vocab_size=270)
    with pytest.raises(FileNotFoundError, match="no such file"):
        sources_at(tmp_path / "none")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="takes a tokenizer"):
        open_documents(SourceConfig(kind="text", path=str(tmp_path)), None, vocab_size=270)
