"""Token files in an object store."""

import itertools

import grain
import numpy as np
import pytest

from tests.data.test_token_files import words
from tests.storage.s3 import Proxy
from tests.storage.test_runs import QUIET, assert_same, outcome
from tests.train.runs import config, table
from zamba2_jax.cli.main import main
from zamba2_jax.data import batches as data
from zamba2_jax.data import remote_tokens
from zamba2_jax.data.batches import batches
from zamba2_jax.data.documents import in_memory
from zamba2_jax.data.token_files import open_token_files, write_token_files
from zamba2_jax.storage.blocks import BLOCK, Blocks
from zamba2_jax.storage.remote import RemoteDirectory, local_files
from zamba2_jax.train.run import run


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of blocks, in which three have room."""
    cache = Blocks(tmp_path / "blocks", 3 * BLOCK)
    monkeypatch.setattr(remote_tokens, "blocks", lambda: cache)
    return cache


def write(directory, documents, vocab_size, shard_tokens=100_000):
    directory.mkdir()
    return write_token_files(directory, documents, words(vocab_size), shard_tokens=shard_tokens)


@pytest.mark.parametrize("vocab_size", [500, 70_000])
def test_what_is_read_there_is_what_was_written(bucket, cache, tmp_path, vocab_size, monkeypatch):
    # Threads that read ahead would go on dropping blocks while they are counted.
    monkeypatch.setattr(data, "READ_FAR", grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    random = np.random.default_rng(0)
    sizes = [*random.integers(1, 60, 9000), 70_000, 8192, 1, 16_384]
    documents = [random.integers(0, vocab_size, size, dtype=np.int32) for size in sizes]
    write(tmp_path / "tokens", documents, vocab_size)
    remote = RemoteDirectory(f"{bucket}/tokens")
    remote.upload(local_files(tmp_path / "tokens"))
    far, near = (
        open_token_files(place, None, vocab_size=vocab_size) for place in (f"{bucket}/tokens", tmp_path / "tokens")
    )
    assert cache.size < 3 * BLOCK  # opened, not read
    for index in (*random.integers(0, len(near), 200).tolist(), *range(len(near) - 4, len(near))):
        np.testing.assert_array_equal(far[index], documents[index])
    streams = [
        iter(batches({"a": source}, {"a": 1.0}, batch_size=4, length=300, seed=0))
        for source in (far, near, in_memory(documents))
    ]
    for one, two, three in itertools.islice(zip(*streams, strict=True), 20):
        np.testing.assert_array_equal(one.tokens, two.tokens)
        np.testing.assert_array_equal(one.tokens, three.tokens)
    files = list((tmp_path / "blocks").iterdir())
    assert sum(file.stat().st_size for file in files) == cache.size <= 3 * BLOCK
    assert Blocks(tmp_path / "blocks", 2 * BLOCK).size <= 2 * BLOCK
    opening = [name for name in ("manifest.json", "windows.bin", "offsets.bin") if name in remote.sizes()]
    assert len(opening) == 3


def test_damaged_files_there_are_named(bucket, cache, tmp_path):
    documents = [np.arange(5, dtype=np.int32)] * 3
    write(tmp_path / "tokens", documents, 50)
    remote = RemoteDirectory(f"{bucket}/tokens")

    def opened(**replaced):
        remote.delete(remote.sizes())
        files = local_files(tmp_path / "tokens")
        remote.upload({name: file for name, file in files.items() if replaced.get(name.split(".")[0], b"") is not None})
        for name in files:
            if replaced.get(stem := name.split(".")[0]):
                remote.write(name, replaced[stem])
        return open_token_files(f"{bucket}/tokens", None, vocab_size=50)

    shard = (tmp_path / "tokens" / "tokens-00000.array_record").read_bytes()
    with pytest.raises(FileNotFoundError, match=rf"{remote}/manifest\.json is missing"):
        opened(manifest=None)
    with pytest.raises(ValueError, match=rf"{remote}/windows\.bin is missing"):
        opened(windows=None)
    with pytest.raises(ValueError, match=rf"{remote}/tokens-00000\.array_record: 5 bytes, expected {len(shard)}"):
        opened(**{"tokens-00000": b"short"})
    with pytest.raises(ValueError, match=r"tokens-00000\.array_record, record 0: expected 30 bytes that are not compr"):
        opened(**{"tokens-00000": bytes(len(shard))})[0]


def test_tokenized_there_and_trained_from_there(bucket, cache, server, use, tmp_path, capsys):
    table(tmp_path)
    tokenizer = RemoteDirectory(f"{bucket}/tokenizer")
    tokenizer.upload(local_files(tmp_path / "tokenizer"))
    for place in (str(tmp_path / "here"), f"{bucket}/there"):
        words = f"--input {tmp_path / 'a'}.jsonl --output {place} --tokenizer {bucket}/tokenizer --processes 1"
        assert main(["tokenize", *words.split()]) == 0
    assert main(["tokenize", *words.split()]) == 2
    assert f"{bucket}/there is there already" in capsys.readouterr().err
    assert main(["tokenize", "--input", f"{bucket}/a.jsonl", *words.split()[2:]]) == 2
    assert "texts are read from this machine" in capsys.readouterr().err
    ends = []
    for place in (str(tmp_path / "here"), f"{bucket}/there"):
        source = {"a": {"kind": "tokens", "path": place}}
        phases = [{"name": "only", "steps": 2, "shares": {"a": 1.0}}]
        values = config(
            tmp_path, directory=f"{place}-run", sources=source, phases=phases, tokenizer=None, evaluation={}
        )
        assert run(values, QUIET)
        ends.append(outcome(values))
    assert_same(*ends)


def test_a_store_that_goes_away_is_an_error_of_the_batch(bucket, cache, server, use, tmp_path):
    random = np.random.default_rng(0)
    write(tmp_path / "tokens", [random.integers(0, 50, 100_000, dtype=np.int32) for _ in range(8)], 50)
    RemoteDirectory(f"{bucket}/tokens").upload(local_files(tmp_path / "tokens"))
    with Proxy(server) as proxy:
        use(proxy.port)
        documents = open_token_files(f"{bucket}/tokens", None, vocab_size=50)
        proxy.limit = 0
        with pytest.raises(OSError, match=rf"{bucket}/tokens/tokens-0000\d\.array_record: "):
            documents[3]
