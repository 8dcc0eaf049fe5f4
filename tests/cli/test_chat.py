"""`zamba2 chat` in a terminal: a process behind a pty."""

import os
import select
import subprocess
import sys
import time

import pytest

from tests.inference.checkpoints import write_checkpoint
from zamba2_jax.checkpoint import hf
from zamba2_jax.cli.chat import HELP
from zamba2_jax.cli.main import main
from zamba2_jax.text.tokenizer import load_tokenizer

pty = pytest.importorskip("pty", reason="needs the terminals of Unix")

# Makes the pty the terminal that Ctrl-C comes from, as a shell does.
PROGRAM = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from zamba2_jax.cli.main import main
sys.exit(main())
"""


class Terminal:
    """Runs a command, types, and waits for what it shows."""

    def __init__(self, *words, **environment):
        self.ours, theirs = pty.openpty()
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words], start_new_session=True, env=os.environ | environment, **streams
        )
        os.close(theirs)

    def until(self, text, seconds=100):
        """What is shown up to and with a text; with an empty one, the next byte."""
        shown, deadline = b"", time.monotonic() + seconds
        while not shown or text.encode() not in shown:
            assert time.monotonic() < deadline, shown
            if select.select([self.ours], [], [], 1)[0]:
                try:
                    shown += os.read(self.ours, 1)
                except OSError:  # the end, on Linux
                    raise AssertionError(f"ended with {shown!r}") from None
        return shown.decode(errors="replace").replace("\r\n", "\n")

    def type(self, text):
        os.write(self.ours, text.encode())

    def end(self):
        self.process.wait(60)
        os.close(self.ours)
        return self.process.returncode


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("chat") / "model")


def test_a_conversation(directory, tmp_path):
    words = ["chat", "--model", str(directory), "--max-new-tokens", "400", "--capacity", "400", "--temperature", "1"]
    terminal = Terminal(*words, TERM="dumb", JAX_COMPILATION_CACHE_DIR=str(tmp_path))
    assert HELP in terminal.until("> ")
    terminal.type("the cat\n")
    terminal.until("\n")
    terminal.until("")
    terminal.type("\x03")
    assert "[broken off]\n" in terminal.until("> ")
    terminal.type("/help\n")
    assert HELP in terminal.until("> ")
    terminal.type("the hat " * 300 + "\n")
    assert "tokens: expected fewer than 400; /new begins" in terminal.until("a new conversation")
    terminal.until("> ")
    terminal.type("/new\n")
    terminal.until("> ")
    terminal.type("/quit\n")
    assert terminal.end() == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens 0: expected at least 1"),
        (["--min-p", "2"], "min_p=2.0: expected a number in [0, 1]"),
        (["--template", "none.jinja"], "[Errno 2] No such file or directory: 'none.jinja'"),
        (["--template", "{tmp}/broken.jinja"], "the chat template does not take this conversation: Expected an expr"),
        (["--system", "x", "--template", "{tmp}/no_system.jinja"], "the chat template does not take this"),
        (["--model", "{tmp}/plain"], "the tokenizer has no chat template"),
    ],
)
def test_errors_come_before_the_weights_are_read(directory, monkeypatch, tmp_path, capsys, words, message):
    def load_hf(*arguments, **options):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(hf, "load_hf", load_hf)
    (tmp_path / "broken.jinja").write_text("{% if %}{")
    (tmp_path / "no_system.jinja").write_text("{{ raise_exception('no') if messages[0].role == 'system' }}")
    write_checkpoint(tmp_path / "plain", template=None)
    assert load_tokenizer(tmp_path / "plain").chat_template is None
    assert main(["chat", "--model", str(directory), *(word.format(tmp=tmp_path) for word in words)]) == 2
    assert f"zamba2: error: {message}" in capsys.readouterr().err
