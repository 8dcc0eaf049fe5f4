"""Trackers of experiments that a run reports to, beside its own files: Weights & Biases and trackio."""

import dataclasses
import importlib.util
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from zamba2_jax.files import read_json, write_json
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.train.config import RunConfig, TrackersConfig, TrackioConfig, WandbConfig
from zamba2_jax.train.metrics import Record, scalars


class Tracker:
    """Gives the numbers of records to a tracker; a context manager around the run.

    What fails after the start costs the tracker numbers, and not the run its life: it is warned of once.
    """

    def __init__(self, name: str, log: Callable[[dict[str, float], int], object], finish: Callable[[bool], object]):
        """Of a tracker that has started.

        Args:
            name: of the tracker, for the warning.
            log: takes numbers by name, and their step.
            finish: is told whether the run ended well.
        """
        self._name, self._log, self._finish, self._warned = name, log, finish, False

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._attempt(lambda: self._finish(kind is None))

    def __call__(self, record: Record) -> None:
        """Sends one record."""
        self._attempt(lambda: self._log(scalars(record), record.step))

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # of a service, its client or the network: anything
            if not self._warned:
                warnings.warn(f"{self._name} lacks numbers of this run, which goes on: {error!r}", stacklevel=1)
            self._warned = True


def check_installed(config: TrackersConfig) -> None:
    """Whether the packages of all trackers that are asked for are there.

    Raises:
        ValueError: one is not; the extra that has it is named.
    """
    for name in _chosen(config):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"logging.trackers.{name}: {name} is not installed: pip install 'zamba2-jax[{name}]'")


def open_trackers(config: RunConfig, directory: Path, architecture: ModelConfig) -> Iterator[Tracker]:
    """Starts each tracker that a run asks for, or goes on with what it was to it before.

    Args:
        config: of the run; the tracker is given it too.
        directory: for what the trackers write, and which of their runs this one is.
        architecture: of the model, for the tracker.

    Raises:
        ValueError: a tracker does not start.
    """
    table = {**config.as_dict(), "architecture": dataclasses.asdict(architecture)}
    for name, settings in _chosen(config.logging.trackers).items():
        own = settings.name or Path(config.directory).resolve().name
        try:
            if isinstance(settings, WandbConfig):
                yield _open_wandb(settings, own, _identity(directory, name), directory, table)
            else:
                yield _open_trackio(settings, f"{own}-{_identity(directory, name)}", table)
        except Exception as error:  # of a service, its client or the network: anything
            hint = '; mode = "offline" needs neither account nor network' if name == "wandb" else ""
            raise ValueError(f"logging.trackers.{name} does not start: {error}{hint}") from error


def _chosen(config: TrackersConfig) -> dict[str, WandbConfig | TrackioConfig]:
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: of for name, of in settings.items() if of is not None}


def _identity(directory: Path, name: str) -> str:
    """What a tracker knows the run in a directory by; made when it is asked for first."""
    path = directory / f"{name}.json"
    if not path.is_file():
        directory.mkdir(exist_ok=True)
        write_json(path, {"id": uuid.uuid4().hex[:8]})
    return read_json(path)["id"]


def _open_wandb(settings: WandbConfig, name: str, id_: str, directory: Path, table: dict[str, Any]) -> Tracker:
    import wandb

    run = wandb.init(
        project=settings.project,
        name=name,
        tags=settings.tags,
        mode=settings.mode,
        id=id_,
        resume="allow",
        reinit="create_new",
        dir=str(directory),
        config=table,
        allow_val_change=True,
        settings=wandb.Settings(console="off"),
    )
    first = run.step  # steps that are there already are not taken again

    def log(values: dict[str, float], step: int) -> None:
        if step >= first:
            run.log(values, step=step)

    return Tracker("wandb", log, lambda well: run.finish(exit_code=0 if well else 1))


def _open_trackio(settings: TrackioConfig, name: str, table: dict[str, Any]) -> Tracker:
    import trackio

    run = trackio.init(project=settings.project, name=name, space_id=settings.space_id, config=table, resume="allow")
    return Tracker("trackio", lambda values, step: run.log(values, step=step), lambda well: run.finish())
