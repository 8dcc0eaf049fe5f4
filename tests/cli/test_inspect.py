import json

import numpy as np
import pytest

from tests.inference.checkpoints import TEXT, write_checkpoint
from zamba2_jax import load_hf
from zamba2_jax.cli import options
from zamba2_jax.cli.main import main
from zamba2_jax.data.batches import held_out
from zamba2_jax.data.documents import in_memory
from zamba2_jax.evaluate import necessity
from zamba2_jax.text.frame import encode_documents, frame_of
from zamba2_jax.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("inspect") / "model")


@pytest.fixture
def call(directory, monkeypatch):
    monkeypatch.setattr(options, "keep_compiled_programs", lambda: None)
    return lambda *words: main(["inspect", "--model", str(directory), *map(str, words)])


def test_what_each_part_of_a_checkpoint_is_worth_on_a_file(call, directory, tmp_path, capsys):
    texts = [TEXT, TEXT[::-1], TEXT[5:]]
    (tmp_path / "unseen.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    outputs = ("--json", tmp_path / "found.json", "--picture", tmp_path / "found.png")
    options = ("--data", tmp_path / "unseen.jsonl", "--seq", 16, "--rows", 4, "--batch", 2, "--select", "all.*")
    assert call(*options, *outputs) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    tokenizer = load_tokenizer(directory)
    tokens = np.concatenate(encode_documents(tokenizer, texts, frame_of(tokenizer)))[: 4 * 16]
    batches = held_out(in_memory([tokens]), batch_size=2, length=16)
    expected = necessity(load_hf(directory), batches, select=["all.*"])
    names = [f"all.{kind}" for kind in ("attention", "adapters", "mlp", "shared", "mixer")]
    assert list(found["silenced"]) == names
    assert (found["tokens"], found["rows"]) == (expected.tokens, 4) == (4 * 15, 4)
    printed = capsys.readouterr().out
    for name in names:
        assert found["silenced"][name]["loss"] == pytest.approx(expected[name].loss, rel=1e-5)
        assert f"{found['silenced'][name]['increase']:+.4f}" in printed
    assert (tmp_path / "found.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--seq", 1), "--seq 1: expected an integer >= 2"),
        (("--rows", 0), "--rows 0: expected an integer >= 1"),
        (("--select", "all.nothing"), "no part matches ['all.nothing']"),
        (("--data", "nowhere.txt"), "nowhere.txt: no such file or directory"),
        (("--json", "nowhere/found.json"), "--json nowhere/found.json: there is no directory nowhere"),
        (("--picture", "nowhere/found.png"), "--picture nowhere/found.png: there is no directory nowhere"),
    ],
)
def test_what_is_wrong_is_named(call, capsys, words, message):
    assert call(*words) == 2
    assert message in capsys.readouterr().err
