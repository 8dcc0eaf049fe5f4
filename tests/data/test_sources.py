import codecs
import gzip
import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from tests.text.kinds import KINDS
from zamba2_jax.data import sources
from zamba2_jax.data.corpus import prose, training_prose
from zamba2_jax.data.sources import SourceConfig, open_documents, size_of, sources_at
from zamba2_jax.data.tokenize import tokenize
from zamba2_jax.text.frame import frame_of
from zamba2_jax.text.tokenizer import load_tokenizer
from zamba2_jax.text.vocabulary import BOS, EOS, train_tokenizer

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
    with pytest.warns(UserWarning, match=": README: not read as jsonl or parquet"):
        found = sources_at(tmp_path, "body")
    assert found == [SourceConfig(kind=kind, path=str(tmp_path), field="body") for kind in ("jsonl", "parquet")]
    with pytest.warns(UserWarning, match=r"README, a\.jsonl, b/1\.jsonl: not read as parquet"):
        texts = [texts_of(open_documents(config, tokenizer, vocab_size=270), tokenizer) for config in found]
    assert texts == [["zero", "one", "two"], ["three"]]
    assert sources_at(tmp_path / "a.jsonl") == [SourceConfig(kind="jsonl", path=str(tmp_path / "a.jsonl"))]


def write_zst(path, content):
    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(content)


LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
FORMS = {
    "a.ndjson": lambda path: path.write_bytes(LINES),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.jsonl.zst": lambda path: write_zst(path, LINES),
    "a.json": lambda path: path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=1)),
    "a.JSON": lambda path: path.write_bytes(LINES),
    "a.jsonl": lambda path: path.write_bytes(codecs.BOM_UTF8 + LINES),
}


@pytest.mark.parametrize("name", FORMS)
def test_json_in_all_its_forms(tokenizer, tmp_path, name):
    FORMS[name](tmp_path / name)
    for path in (tmp_path / name, tmp_path):
        (config,), done = sources_at(path), []
        documents = open_documents(config, tokenizer, vocab_size=270, progress=done.append)
        assert texts_of(documents, tokenizer) == TEXTS
        assert sum(done) == size_of(config)


def test_texts_may_be_compressed_and_begin_with_a_byte_order_mark(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + TEXTS[0].encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(TEXTS[1].encode()))
    write_zst(tmp_path / "c.md.zst", TEXTS[2].encode())
    (config,) = sources_at(tmp_path)
    assert texts_of(open_documents(config, tokenizer, vocab_size=270), tokenizer) == TEXTS
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(TEXTS[1].encode())[:-9])
    with pytest.raises(ValueError, match=r"b\.txt\.gz: cannot be decompressed"):
        open_documents(config, tokenizer, vocab_size=270)


def test_a_directory_names_what_is_not_read(tokenizer, tmp_path):
    """Among it .json files that hold no texts, such as those of a tokenizer."""
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "config.json").write_text('{"x": 1}')
    (tmp_path / "b.csv").touch()
    (tmp_path / ".hidden.jsonl").touch()
    config = SourceConfig(kind="jsonl", path=str(tmp_path))
    with pytest.warns(UserWarning, match=r": b\.csv, config\.json: not read as jsonl$"):
        documents = open_documents(config, tokenizer, vocab_size=270)
    assert texts_of(documents, tokenizer) == TEXTS


@pytest.mark.parametrize("kind", ["chatml", "mistral, bare model", "fast, added tokens"])
def test_every_source_has_the_ids_that_generation_is_fed(tmp_path, kind):
    """But for the frame, whatever the source; names of special tokens are text unless it says otherwise."""
    pytest.importorskip("sentencepiece", reason="needs the extra sentencepiece, which is not installed")
    tokenizer = load_tokenizer(KINDS[kind](tmp_path / "tokenizer"))
    texts = [" leading", "two  spaces\n", "né 日本語 🎉", "a<extra>b<|im_end|> c</s>", "x"]
    write_text(tmp_path / "text", texts)
    write_jsonl(tmp_path / "a.jsonl", texts)
    write_parquet(tmp_path / "a.parquet", texts)
    paths = {"text": tmp_path / "text", "jsonl": tmp_path / "a.jsonl", "parquet": tmp_path / "a.parquet"}
    for special in (False, True):
        fed = {
            text: tokenizer.encode(text, add_special_tokens=False) if special else tokenizer.encode_batch([text])[0]
            for text in texts
        }
        assert all(fed[text] == tokenizer.encode(text, add_special_tokens=False) for text in texts if "<" not in text)
        found = {}
        for name, path in paths.items():
            config = SourceConfig(kind=name, path=str(path), special_tokens=special, bos="", eos="")
            found[name] = open_documents(config, tokenizer, vocab_size=33_000)
            assert sorted(map(tuple, found[name])) == sorted(map(tuple, fed.values()))
    output = tmp_path / "tokens"
    sources = sources_at(paths["jsonl"], special_tokens=True, bos="", eos="")
    tokenize(sources, output, tmp_path / "tokenizer", processes=1, shard_tokens=99, progress=lambda size: None)
    of_files = open_documents(SourceConfig(kind="tokens", path=str(output)), tokenizer, vocab_size=33_000)
    assert [tuple(row) for row in of_files] == [tuple(fed[text]) for text in texts]
    framed = open_documents(SourceConfig(kind="jsonl", path=str(paths["jsonl"])), tokenizer, vocab_size=33_000)
    begin, end = frame_of(tokenizer)
    assert tuple(framed[0]) == (*begin, *tokenizer.encode(" leading", add_special_tokens=False), *end)
    assert tokenizer.encode(texts[3], add_special_tokens=False) != tokenizer.encode_batch([texts[3]])[0]


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
        (lambda path: path.write_text('{"text": "x"}\n{"text": "\\ud800"}'), r"line 2: half of a surrogate pair"),
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
    (the,) = tokenizer.encode("the", add_special_tokens=False)
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
        (
            {"kind": "tokens", "path": "x", "eos": ""},
            "kind='tokens' with eos='': expected none, it is tokenized",
        ),
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
