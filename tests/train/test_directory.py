"""Which tokenizer a run has."""

import pytest

from tests.text.kinds import bpe, chatml, write
from tests.train.runs import config
from zamba2_jax.text.tokenizer import load_tokenizer
from zamba2_jax.train.directory import open_tokenizer, write_run


def test_a_run_has_the_tokenizer_it_names_or_else_that_of_its_checkpoint(tmp_path, monkeypatch):
    pytest.importorskip("sentencepiece", reason="needs the extra sentencepiece, which is not installed")
    import huggingface_hub

    checkpoint, bare = chatml(tmp_path / "checkpoint"), bpe(tmp_path / "bare")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, allow_patterns: str(checkpoint))
    text = " leading 日本 a<extra>"
    of_checkpoint = config(tmp_path, model={"hf": str(checkpoint)}, tokenizer=None)
    named = config(tmp_path, tokenizer="owner/name")
    of_file = config(tmp_path, tokenizer=str(bare / "tokenizer.model"))
    for number, (run, source) in enumerate(((of_checkpoint, checkpoint), (named, checkpoint), (of_file, bare))):
        directory = tmp_path / f"run{number}"
        directory.mkdir()
        tokenizer = open_tokenizer(run, directory, 500)
        assert tokenizer.encode(text) == load_tokenizer(source).encode(text)
        architecture = config(tmp_path).model.resolve()
        write_run(run, architecture, tokenizer, directory)
        assert open_tokenizer(run, directory, 500).encode(text) == tokenizer.encode(text)
    without = write(tmp_path / "without")
    (without / "config.json").write_text("{}")
    assert open_tokenizer(config(tmp_path, model={"hf": str(without)}, tokenizer=None), tmp_path / "new", 500) is None
