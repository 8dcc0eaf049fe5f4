import io
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from tests.helpers import COMMAND
from tests.inference.checkpoints import write_checkpoint
from zamba2_jax import generate, load_hf
from zamba2_jax.checkpoint import hf
from zamba2_jax.cli import options
from zamba2_jax.cli.main import main
from zamba2_jax.text.tokenizer import load_tokenizer

PROMPTS = ["the cat", "on the mat"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("generate") / "model")


@pytest.fixture(scope="module")
def continuations(directory):
    tokenizer = load_tokenizer(directory)
    return generate(load_hf(directory), PROMPTS, 6, tokenizer=tokenizer, stop_tokens=(2,))


@pytest.fixture
def call(directory, monkeypatch):
    """The command in this process, which keeps its compiled programs to itself."""
    monkeypatch.setattr(options, "keep_compiled_programs", lambda: None)
    return lambda *words: main(["generate", "--model", str(directory), "--max-new-tokens", "6", *map(str, words)])


@pytest.mark.parametrize(
    "words", [("--prompt", *PROMPTS), ("--prompt", PROMPTS[0], "--stream", "--prompt", *PROMPTS[1:])]
)
def test_prompts_are_printed_with_their_continuations(call, continuations, capsys, words):
    assert call(*words) == 0
    expected = [prompt + continuation + "\n" for prompt, continuation in zip(PROMPTS, continuations, strict=True)]
    assert capsys.readouterr().out == "\n".join(expected)


def test_lines_come_from_standard_input_and_go_to_standard_output(call, continuations, capfdbinary, monkeypatch):
    lines = b"".join(json.dumps({"prompt": prompt}).encode() + b"\n" for prompt in PROMPTS)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines)))
    assert call("--input", "-", "--logprobs") == 0
    found = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    by_id = sorted(found, key=lambda line: line["id"])
    assert [(line["prompt"], line["text"]) for line in by_id] == list(zip(PROMPTS, continuations, strict=True))
    assert all(len(line["logprobs"]) == len(line["tokens"]) for line in found)


def test_an_interrupted_job_keeps_what_is_done_and_goes_on(directory, tmp_path):
    """In processes of their own, which also keep their compiled programs where the user's caches are.

    With one slot, so that nearly all is still to be done when the first prompt is.
    """
    lines = [{"prompt": "the cat", "id": f"n{i}", "temperature": 1.0, "max_new_tokens": 400 + i} for i in range(40)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["generate", "--model", str(directory), "--ignore-eos", "--slots", "1"]
    words += ["--input", str(tmp_path / "in.jsonl"), "--output"]
    out = tmp_path / "out.jsonl"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    how = {"env": environment, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*COMMAND, *words, str(out)], **how) as process:
        while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n")):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    done = out.read_bytes().count(b"\n")
    assert process.returncode == 130
    assert f"zamba2: interrupted, {done} of 40 prompts are done: the same command with --resume goes on" in said
    assert 0 < done < 40
    assert list((tmp_path / "zamba2-jax" / "compiled").iterdir())

    first = out.read_bytes()
    out.write_bytes(first + b'{"id": "n')
    again = subprocess.run([*COMMAND, *words, str(out), "--resume"], check=True, **how)
    assert f"40 results in {out}" in again.stderr
    assert out.read_bytes().startswith(first)
    results = (
        out.read_bytes().rstrip(b"\n").split(b"\n")
    )  # texts may hold what `str.splitlines` takes for the end of a line
    assert {json.loads(line)["id"] for line in results} == {f"n{i}" for i in range(40)}
    assert len(results) == 40


def test_a_reader_that_goes_away_ends_the_command_without_a_word():
    """As `| head` does."""
    code = (
        "import sys; from zamba2_jax.cli import tokenize, main\n"
        "def run(self):\n    while True: print('x' * 1000, flush=True)\n"
        "tokenize.Tokenize.run = run\n"
        "sys.exit(main.main('tokenize --input x --output y --tokenizer z'.split()))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (128 + signal.SIGPIPE, b"")


def test_a_job_goes_on_with_its_own_model_and_settings_alone(call, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "on the mat"}\n')
    words = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert call(*words) == 0
    whole = (tmp_path / "out.jsonl").read_text().splitlines()
    (tmp_path / "out.jsonl").write_text(whole[0] + "\n")
    capsys.readouterr()
    assert call(*words, "--resume", "--temperature", "1", "--max-new-tokens", "7", "--stop", "x") == 2
    said = capsys.readouterr().err
    assert "were made by another job:\n  max_new_tokens: 6 before, 7 now\n  temperature: 0.0 before, 1.0 now\n" in said
    assert "  stop: [] before, ['x'] now" in said
    assert call(*words, "--resume") == 0
    assert sorted((tmp_path / "out.jsonl").read_text().splitlines()) == sorted(whole)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected one of --prompt and --input"),
        (["--prompt", "x", "--input", "-"], "expected one of --prompt and --input"),
        (["--prompt", "\udcff"], "prompt 0 is '\\udcff', with half of a surrogate pair: expected text"),
        (["--prompt", "x", "--top-p", "0"], "top_p=0.0: expected a number in (0, 1]"),
        (["--prompt", "x", "--capacity", "0"], "--capacity 0: expected at least 1"),
        (["--prompt", "x", "--capacity", "6"], "2 tokens and 6 new ones: expected at most the capacity, 6"),
        (["--prompt", "x", "--stop", ""], "stop_strings=('',): expected a sequence of strings, none empty"),
        (["--prompt", "x", "--slots", "0"], "--slots 0: expected at least 1"),
        (["--prompt", "x", "--resume"], "--resume needs --output"),
        (["--prompt", "x", "--logprobs"], "--logprobs needs --output"),
        (["--input", "{tmp}/in.jsonl", "--stream"], "--stream needs --prompt"),
        (["--input", "{tmp}/in.jsonl"], "line 1: prompt holds token 290, expected ids in [0, 290)"),
        (["--input", "{tmp}/none.jsonl"], "[Errno 2] No such file or directory"),
        (["--prompt", "x", "--output", "{tmp}/in.jsonl"], "{tmp}/in.jsonl exists: expected a new file"),
        (["--prompt", "x", "--output", "{tmp}/none/out"], "{tmp}/none/out: there is no directory {tmp}/none"),
        (["--prompt", "x", "--model", "{tmp}"], "no config.json at {tmp}/config.json"),
        (["--prompt", "x", "--model", "{tmp}/bare"], "{tmp}/bare has neither model.safetensors nor"),
        (["--prompt", "x", "--model", "{tmp}/mute"], "{tmp}/mute has no tokenizer: expected tokenizer.json"),
    ],
)
def test_errors_come_before_the_weights_are_read(call, directory, monkeypatch, tmp_path, capsys, words, message):
    def load_hf(*arguments, **options):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(hf, "load_hf", load_hf)
    (tmp_path / "in.jsonl").write_text('{"tokens": [290]}')
    for name, files in {"bare": ["config.json"], "mute": ["config.json", "model.safetensors"]}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).symlink_to(directory / file)
    assert call(*(word.format(tmp=tmp_path) for word in words)) == 2
    assert f"zamba2: error: {message.format(tmp=tmp_path)}" in capsys.readouterr().err
