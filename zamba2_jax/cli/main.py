"""The console command `zamba2`."""

import contextlib
import dataclasses
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import tyro


class Command(Protocol):
    """A subcommand, made by tyro from its arguments."""

    def run(self) -> int:
        """Does the work and returns the exit code."""


class Entry(NamedTuple):
    """Where a subcommand is, so that only the one asked for is imported.

    Attributes:
        module, name: its dataclass.
        summary: its line in `zamba2 --help`, the first of its docstring.
    """

    module: str
    name: str
    summary: str


COMMANDS = {
    "chat": Entry("zamba2_jax.cli.chat", "Chat", "Talk with a model."),
    "check": Entry(
        "zamba2_jax.cli.check",
        "Check",
        "Run every kernel on the devices that are here, against an oracle and the clock.",
    ),
    "demo": Entry(
        "zamba2_jax.cli.demo", "Demo", "Train a small language model on text this Python carries, and let it write."
    ),
    "export": Entry(
        "zamba2_jax.cli.export", "Export", "Write a checkpoint of a training run as a Hugging Face checkpoint."
    ),
    "generate": Entry("zamba2_jax.cli.generate", "Generate", "Continue prompts with a model."),
    "inspect": Entry("zamba2_jax.cli.inspect", "Inspect", "Say which parts of a model its predictions need."),
    "plan": Entry(
        "zamba2_jax.cli.plan",
        "Plan",
        "Compile a step of training or inference for a slice of TPUs, without the TPUs, and say what it takes.",
    ),
    "parity": Entry(
        "zamba2_jax.cli.parity", "Parity", "Compare this package with PyTorch and both with a float64 oracle."
    ),
    "sweep": Entry(
        "zamba2_jax.cli.sweep",
        "Sweep",
        "Train variants of a run with several seeds, those of one shape together, and compare them.",
    ),
    "runs": Entry("zamba2_jax.cli.runs", "Runs", "Compare training runs: settings, numbers, curves."),
    "tokenize": Entry("zamba2_jax.cli.tokenize", "Tokenize", "Turn texts into token files to train on."),
    "train": Entry("zamba2_jax.cli.train", "Train", "Train a model, or go on with a run that was interrupted."),
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 2 for bad arguments or files, with a line that says why.

    A reader that closes the pipe, as `head` does, ends it without a word, with the code that shells give for that.

    Args:
        args: the words after `zamba2`; those of the process by default.
    """
    words = sys.argv[1:] if args is None else list(args)
    choices = {name: _constructor(entry, chosen=words[:1] == [name]) for name, entry in COMMANDS.items()}
    try:
        command: Command = tyro.extras.subcommand_cli_from_dict(
            choices, prog="zamba2", description="Zamba2 in JAX.", args=words
        )
        with _plain_warnings():
            return command.run()
    except BrokenPipeError:
        # What is still to be written would be an error again when Python ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:
        print(f"zamba2: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("zamba2: interrupted", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Has warnings of this package shown as a line, without a place in its code."""
    package, otherwise = os.path.dirname(os.path.dirname(__file__)), warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **options: Any) -> None:
        if filename.startswith(package):
            print(f"zamba2: warning: {message}", file=sys.stderr)
        else:
            otherwise(message, category, filename, *rest, **options)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _constructor(entry: Entry, *, chosen: bool) -> Callable[..., Command]:
    """The dataclass of a subcommand, or one without fields in its place if it is not the one asked for."""
    if chosen:
        return getattr(importlib.import_module(entry.module), entry.name)
    return dataclasses.make_dataclass(entry.name, [], namespace={"__doc__": entry.summary})


if __name__ == "__main__":
    sys.exit(main())
