import json

import numpy as np
import pytest

from zamba2_jax.cli.main import main
from zamba2_jax.data import sources
from zamba2_jax.data.sources import SourceConfig, open_documents
from zamba2_jax.data.tokenize import tokenize
from zamba2_jax.text.vocabulary import EOS, load_tokenizer, save_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat and the hat and the bat " * 3], 270)


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))


def test_the_command_writes_what_opening_the_texts_gives(tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", 100)
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(["the", "cat", "<eos>", "\n"], size)) for size in random.integers(1, 60, 50)]
    save_tokenizer(tokenizer, tmp_path)
    write_jsonl(tmp_path / "a.jsonl", texts[:20])
    write_jsonl(tmp_path / "b.jsonl", texts[20:])
    words = f"--input {tmp_path} --output {tmp_path / 'out'} --tokenizer {tmp_path} --field body --processes 2"
    assert main(["tokenize", *words.split(), "--shard-tokens", "300"]) == 0
    loaded = load_tokenizer(tmp_path)
    read, expected = (
        open_documents(SourceConfig(kind=kind, path=str(path), field="body"), loaded, vocab_size=270)
        for kind, path in (("tokens", tmp_path / "out"), ("jsonl", tmp_path))
    )
    np.testing.assert_array_equal(read.offsets, expected.offsets)
    assert read.text_bytes == expected.text_bytes == sum(map(len, texts))
    for document, other, text in zip(read, expected, texts, strict=True):
        np.testing.assert_array_equal(document, other)
        assert (document == EOS).sum() == 1  # and "<eos>" in a text is text
        assert tokenizer.decode(document[1:-1].tolist()) == text
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / file).read_bytes()
    shards = sorted((tmp_path / "out").glob("*.array_record"))
    assert len(shards) > 3
    assert f"50 documents, {read.tokens:,} tokens in {len(shards)} shards" in capsys.readouterr().out
    assert main(["tokenize", *words.split()]) == 2
    assert "out is there already: expected a new or an empty directory" in capsys.readouterr().err


def test_an_error_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", 1)
    write_jsonl(tmp_path / "a.jsonl", ["x"] * 9 + [3])
    save_tokenizer(tokenizer, tmp_path)
    before, done = set(tmp_path.iterdir()), []
    with pytest.raises(ValueError, match=r"a\.jsonl, line 10"):
        tokenize(
            [SourceConfig(kind="jsonl", path=str(tmp_path), field="body")],
            tmp_path / "out",
            tmp_path,
            processes=1,
            shard_tokens=5,
            progress=done.append,
        )
    assert done
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["processes", "shard_tokens"])
def test_bad_numbers(tmp_path, name):
    numbers = {"processes": 1, "shard_tokens": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name}=0"):
        tokenize([], tmp_path / "out", tmp_path, progress=print, **numbers)


def test_no_tokenizer(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("x")
    words = ["tokenize", "--input", str(tmp_path), "--output", str(tmp_path / "out"), "--tokenizer"]
    for content, message in (
        (None, "has no tokenizer: expected tokenizer.json or tokenizer.model"),
        ("{}", "tokenizer.json is not a valid tokenizer"),
        (
            json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}),
            "the tokenizer names no eos_token: expected one in tokenizer_config.json beside it, or the option eos",
        ),
    ):
        if content:
            (tmp_path / "tokenizer.json").write_text(content)
        assert main([*words, str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
