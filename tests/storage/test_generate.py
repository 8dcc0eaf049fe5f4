"""Prompts from an object store, and results there."""

import json

from tests.inference.checkpoints import write_checkpoint
from zamba2_jax.cli import options
from zamba2_jax.cli.main import main
from zamba2_jax.storage.remote import RemoteDirectory, local_files


def test_prompts_come_from_there_and_results_go_there(bucket, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(options, "keep_compiled_programs", lambda: None)
    remote = RemoteDirectory(bucket)
    (remote / "model").upload(local_files(write_checkpoint(tmp_path / "model")))
    lines = [json.dumps({"prompt": prompt}) for prompt in ("the cat", "on the mat", "the mat")]
    remote.write("prompts.jsonl", "\n".join(lines).encode())

    def call(output, *options, source=f"{bucket}/prompts.jsonl"):
        words = ["--model", f"{bucket}/model", "--input", source, "--output", str(output), "--max-new-tokens", "3"]
        return main(["generate", *words, *options])

    assert call(tmp_path / "here.jsonl") == 0
    assert call(f"{bucket}/out/there.jsonl") == 0
    there = remote.read("out/there.jsonl")
    assert there == (tmp_path / "here.jsonl").read_bytes()
    assert json.loads(remote.read("out/there.jsonl.settings.json"))["lines"] == [[0, {}], [1, {}], [2, {}]]
    assert call(f"{bucket}/out/there.jsonl") == 2
    assert f"{bucket}/out/there.jsonl exists: expected a new file, or --resume" in capsys.readouterr().err
    whole = there.splitlines(keepends=True)
    remote.write("out/there.jsonl", b"".join(whole[:2]) + whole[2][:5])
    assert call(f"{bucket}/out/there.jsonl", "--resume") == 0
    assert remote.read("out/there.jsonl") == there
    assert call(f"{bucket}/out/other.jsonl", source=f"{bucket}/nothing.jsonl") == 2
    assert f"{bucket}/nothing.jsonl: no such file" in capsys.readouterr().err
