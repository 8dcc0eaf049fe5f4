"""The directory of a run: what is where in it, and whether a run may go on in it."""

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from zamba2_jax.data.corpus import embedded_tokenizer
from zamba2_jax.data.sources import SourceConfig
from zamba2_jax.files import write_directory_atomically, write_json
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.text.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from zamba2_jax.text.vocabulary import copy_tokenizer, save_tokenizer
from zamba2_jax.train.config import EMBEDDED_TOKENIZER, RunConfig, architecture_from_table, differences, from_table

CONFIG = "config.json"  # the RunConfig with all its defaults; written last, so that it says that a run is here
ARCHITECTURE = "architecture.json"  # the ModelConfig
TOKENIZER = "tokenizer"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
TRACKERS = "trackers"  # which runs of trackers this run is, and what these write here
PROFILE = "profile"
DIVERGED = ".diverged"  # why a run ended so, until it goes on

NAMES = (CONFIG, ARCHITECTURE, TOKENIZER, CHECKPOINTS, METRICS, TENSORBOARD, TRACKERS, PROFILE)
"""All that a run writes, beside files whose names begin with a dot."""


@contextlib.contextmanager
def claim(directory: Path, *, marker: str = CONFIG, names: Sequence[str] = NAMES) -> Iterator[None]:
    """Makes the directory of a run if need be, and keeps other processes from running in it meanwhile.

    Args:
        directory: of a run, or of what else lives by these rules.
        marker: the file that says that one is there, which may then hold anything.
        names: what one without it may hold.

    Raises:
        OSError: it cannot be written to, holds what is not of a run, or another process is running in it.
    """
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file: expected a directory for the run")
    directory.mkdir(parents=True, exist_ok=True)
    foreign = sorted(path.name for path in directory.iterdir() if path.name not in names and path.name[0] != ".")
    if foreign and not (directory / marker).is_file():
        raise FileExistsError(f"{directory} holds {', '.join(foreign[:3])}: expected a new directory, or that of a run")
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process is running in {directory}") from None
        yield


def is_running(directory: Path) -> bool:
    """Whether a process has claimed the directory of a run; of other machines only as far as its file system knows."""
    try:
        with (directory / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def read_run(directory: Path) -> tuple[RunConfig, ModelConfig]:
    """What the run in a directory was started with.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: its files are not valid.
    """
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"{directory} is not the directory of a run: there is no {CONFIG} in it")
    config = from_table(RunConfig, _read_json(directory / CONFIG))
    return config, architecture_from_table(_read_json(directory / ARCHITECTURE), ARCHITECTURE)


def resolve_architecture(config: RunConfig, directory: Path) -> ModelConfig:
    """The architecture of the run that is in the directory, or else of a new one.

    Raises:
        ValueError: the run that is there has another config, in what changes its numbers; all differences are listed.
            Or the architecture is not valid.
        OSError: the checkpoint to start from is not there.
    """
    if not (directory / CONFIG).is_file():
        return config.model.resolve()
    before, architecture = read_run(directory)
    lines = differences(before, config)
    if not lines and config.model.hf is None and config.model.resolve() != architecture:
        lines = [f"model: {config.model.preset} is not the architecture of the run any more, see {ARCHITECTURE}"]
    if lines:
        listed = "\n  ".join(lines)
        raise ValueError(f"the run in {directory} was started with another config:\n  {listed}")
    return architecture


def open_tokenizer(config: RunConfig, directory: Path | None, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of the run that is in the directory, if any, or else of a new one; None where it has none.

    Raises:
        ValueError, OSError: as `load_tokenizer`, `embedded_tokenizer`.
    """
    if directory is not None and (directory / TOKENIZER).is_dir():
        return load_tokenizer(directory / TOKENIZER)
    if config.tokenizer == EMBEDDED_TOKENIZER:
        return embedded_tokenizer(vocab_size)
    source = _tokenizer_source(config)
    try:
        return None if source is None else load_tokenizer(source)
    except FileNotFoundError:
        if config.tokenizer is None:  # a checkpoint without one, which token files can do without
            return None
        raise


def _tokenizer_source(config: RunConfig) -> str | None:
    """The tokenizer that the config names, or that is beside token files, or that of the checkpoint to start from."""
    if config.tokenizer is not None:
        return config.tokenizer
    beside = (
        str(source.path)
        for source in config.sources.values()
        if isinstance(source, SourceConfig) and source.kind == "tokens"
    )
    return next((path for path in beside if has_tokenizer(Path(path))), config.model.hf)


def write_run(config: RunConfig, architecture: ModelConfig, tokenizer: Tokenizer | None, directory: Path) -> None:
    """Writes down what the run is, for when it goes on.

    Raises:
        OSError: the directory cannot be written to.
    """
    if tokenizer is not None and not (directory / TOKENIZER).is_dir():
        write_directory_atomically(directory / TOKENIZER, lambda path: _write_tokenizer(config, tokenizer, path))
    table = {"model_type": architecture.model_type, **dataclasses.asdict(architecture)}
    write_json(directory / ARCHITECTURE, table)
    write_json(directory / CONFIG, config.as_dict())


def _write_tokenizer(config: RunConfig, tokenizer: Tokenizer, directory: Path) -> None:
    if config.tokenizer == EMBEDDED_TOKENIZER:
        save_tokenizer(tokenizer, directory)
    elif (source := _tokenizer_source(config)) is not None:
        copy_tokenizer(source, directory)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
