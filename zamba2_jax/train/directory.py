"""The directory of a run: what is where in it, and whether a run may go on in it."""

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from zamba2_jax.checkpoint.history import Checkpoints
from zamba2_jax.checkpoint.remote import RemoteCheckpoints
from zamba2_jax.data.corpus import embedded_tokenizer
from zamba2_jax.data.sources import SourceConfig
from zamba2_jax.files import exclusively, write_directory_atomically, write_json
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.storage.local import Mirror, scratch
from zamba2_jax.storage.remote import RemoteDirectory, is_remote
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

_CLAIM = ".claim.json"


class Place(NamedTuple):
    """Where a run is.

    Attributes:
        directory: its files on this machine; those of a run in an object store are copies.
        remote: the directory in the object store.
        mirror: what copies files there.
    """

    directory: Path
    remote: RemoteDirectory | None = None
    mirror: Mirror | None = None

    def checkpoints(
        self, *, keep_last: int | None = None, keep_every: int | None = None, read_only: bool = False
    ) -> Checkpoints:
        """The checkpoints of the run; arguments and errors as for `Checkpoints`."""
        if self.remote is None:
            return Checkpoints(
                self.directory / CHECKPOINTS, keep_last=keep_last, keep_every=keep_every, read_only=read_only
            )
        return RemoteCheckpoints(
            self.remote / CHECKPOINTS,
            self.directory / CHECKPOINTS,
            keep_last=keep_last,
            keep_every=keep_every,
            read_only=read_only,
            before_commit=self.mirror.copy if self.mirror else lambda: None,
        )


@contextlib.contextmanager
def open_run(location: str) -> Iterator[Place]:
    """The place of a run to train in, a local directory or the URL of one in an object store, made if need be.

    Meanwhile other processes do not run in it; of one in an object store this holds for those of the same machine. All
    processes of a run call this.

    Raises:
        OSError: as `claim`; or the store refuses, or cannot be reached.
        ValueError: there is no such kind of store.
    """
    first = jax.process_index() == 0
    if not is_remote(location):
        directory = Path(location).resolve()
        with claim(directory) if first else contextlib.nullcontext():
            yield Place(directory)
        return
    remote = RemoteDirectory(location)
    with scratch(remote.url, jax.process_index()) as directory:
        names = remote.sizes()
        _refuse_foreign(remote.url, {name.split("/")[0] for name in names})
        if not first:
            _fetch(remote, names, directory)
            yield Place(directory, remote)
            return
        # It tells who ran here last, and, before long work, whether the store lets us write.
        remote.write(_CLAIM, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode())
        _fetch(remote, names, directory)
        with Mirror(directory, remote, leave_out=CHECKPOINTS, last=CONFIG) as mirror:
            yield Place(directory, remote, mirror)


@contextlib.contextmanager
def look_at_run(location: str | os.PathLike[str]) -> Iterator[Place]:
    """The place of a run to read from, which may be going on.

    Raises:
        OSError: the store refuses, or cannot be reached.
        ValueError: there is no such kind of store.
    """
    if not is_remote(location):
        yield Place(Path(location))
        return
    remote = RemoteDirectory(os.fspath(location))
    names = remote.sizes()
    if CONFIG not in names:
        raise FileNotFoundError(f"{remote} is not the directory of a run: there is no {CONFIG} in it")
    with tempfile.TemporaryDirectory(prefix="zamba2-jax-") as name:
        _fetch(remote, names, Path(name))
        yield Place(Path(name), remote)


def _fetch(remote: RemoteDirectory, names: Iterable[str], directory: Path) -> None:
    """Copies what a run begins with again."""
    wanted = [
        name for name in names if name in (CONFIG, ARCHITECTURE, METRICS) or name.split("/")[0] in (TOKENIZER, TRACKERS)
    ]
    if CONFIG in wanted:
        remote.download({name: directory / name for name in wanted})


def _refuse_foreign(location: str, found: set[str], marker: str = CONFIG, names: Collection[str] = NAMES) -> None:
    """Raises a FileExistsError if a directory without the file `marker` holds other than `names`."""
    foreign = sorted(name for name in found if name not in names and name[0] != ".")
    if foreign and marker not in found:
        raise FileExistsError(f"{location} holds {', '.join(foreign[:3])}: expected a new directory, or that of a run")


@contextlib.contextmanager
def claim(directory: Path, *, marker: str = CONFIG, names: Collection[str] = NAMES) -> Iterator[None]:
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
    _refuse_foreign(str(directory), {path.name for path in directory.iterdir()}, marker, names)
    with exclusively(directory / ".lock", f"another process is running in {directory}"):
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
        raise ValueError(f"the run in {config.directory} was started with another config:\n  {listed}")
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
    return next((path for path in beside if has_tokenizer(path)), config.model.hf)


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
