import itertools
import json

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from zamba2_jax.data import token_files
from zamba2_jax.data.batches import batches
from zamba2_jax.data.documents import in_memory
from zamba2_jax.data.token_files import open_token_files, write_token_files


def words(size):
    """A tokenizer of `size` tokens."""
    return Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))


@pytest.fixture
def documents(monkeypatch):
    """Documents shorter and longer than the records, which are of 7 tokens."""
    monkeypatch.setattr(token_files, "RECORD_TOKENS", 7)
    random = np.random.default_rng(0)
    return [random.integers(3, 50, size, dtype=np.int32) for size in (2, 7, 30, 5, 14, 1, 6, 40, 3)]


@pytest.fixture
def directory(documents, tmp_path):
    path = tmp_path / "tokens"
    path.mkdir()
    write_token_files(path, documents, words(50), shard_tokens=20)
    return path


def opened(path, tokenizer=None, vocab_size=50):
    return open_token_files(path, tokenizer, vocab_size=vocab_size)


def test_documents_are_read_as_written(documents, directory):
    manifest = json.loads((directory / "manifest.json").read_text())
    assert [shard["documents"] for shard in manifest["shards"]] == [3, 3, 2, 1]
    assert [shard["tokens"] for shard in manifest["shards"]] == [39, 20, 46, 3]
    read = opened(directory, words(50))
    assert (len(read), read.tokens) == (9, 108)
    for document, expected in zip(read, documents, strict=True):
        assert document.dtype == np.int32
        np.testing.assert_array_equal(document, expected)
    whole = in_memory(documents)
    np.testing.assert_array_equal(read.offsets, whole.offsets)
    for first, last in itertools.pairwise(read.offsets.tolist()):
        for start, stop in itertools.combinations(range(first, last + 1), 2):
            np.testing.assert_array_equal(read.read(start, stop), whole.read(start, stop))


def test_batches_are_those_of_the_documents_in_memory(documents, directory):
    streams = [
        iter(batches({"a": source}, {"a": 1.0}, batch_size=4, length=9, seed=0))
        for source in (opened(directory), in_memory(documents))
    ]
    for batch, expected in itertools.islice(zip(*streams, strict=True), 8):
        np.testing.assert_array_equal(batch.tokens, expected.tokens)
        np.testing.assert_array_equal(batch.segment_ids, expected.segment_ids)


@pytest.mark.parametrize(("size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_tokens_are_stored_in_as_few_bytes_as_hold_them(tmp_path, size, dtype):
    document = np.array([0, size - 1, 5], np.int32)
    assert write_token_files(tmp_path, [document], words(size), shard_tokens=20).dtype == dtype
    np.testing.assert_array_equal(opened(tmp_path, vocab_size=size)[0], document)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def overwrite(path):
    path.write_bytes(b"x" * path.stat().st_size)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "tokens-00001.array_record",
            truncate,
            r"tokens-00001\.array_record: \d+ bytes, expected \d+: it is truncated",
        ),
        ("tokens-00001.array_record", lambda path: path.unlink(), r"tokens-00001\.array_record is missing"),
        ("tokens-00001.array_record", overwrite, r"tokens-00001\.array_record is no ArrayRecord file"),
        ("offsets.bin", truncate, r"offsets\.bin: 77 bytes, expected 80"),
        ("offsets.bin", overwrite, r"offsets\.bin: from \d+ to \d+: expected 0 to 108 tokens"),
        ("manifest.json", truncate, r"manifest\.json is no manifest of token files"),
        ("manifest.json", lambda path: path.write_text("[]"), r"manifest\.json is no manifest"),
        ("manifest.json", lambda path: edit(path, format="zamba2-tokens-9"), "its format is 'zamba2-tokens-9'"),
        ("manifest.json", lambda path: edit(path, shards=3), r"manifest\.json is no manifest"),
        ("manifest.json", lambda path: edit(path, colour=3), r"manifest\.json is no manifest.*colour"),
        ("manifest.json", lambda path: path.unlink(), r"manifest\.json is missing: .*`zamba2 tokenize`"),
    ],
)
def test_damaged_files_are_named(directory, name, damage, message):
    damage(directory / name)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        opened(directory)


def test_the_wrong_tokenizer_or_vocabulary(documents, directory):
    with pytest.raises(ValueError, match="made by another tokenizer, of 50 tokens; expected the one given, of 51"):
        opened(directory, words(51), vocab_size=51)
    largest = max(int(document.max()) for document in documents[:3])
    place = int(np.concatenate(documents[:3]).argmax())
    message = rf"tokens-00000\.array_record, record {place // 7}: token id {largest} is outside the vocabulary"
    with pytest.raises(ValueError, match=message):
        opened(directory, vocab_size=largest)
    assert len(opened(directory, vocab_size=1 + max(int(document.max()) for document in documents))) == 9
