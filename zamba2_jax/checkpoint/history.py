"""The checkpoints of a run: written in the background, whole or not at all, old ones dropped by a rule."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import orbax.checkpoint as ocp

from zamba2_jax.checkpoint.store import abstract_arrays, check_stored, named_arrays, with_arrays

Tree = TypeVar("Tree")


class Checkpoints:
    """A directory of checkpoints by step, each a state and a note; a context manager, which waits for the last one.

    A checkpoint is written under another name and renamed when it is complete, so that one that was cut off is never
    taken for a checkpoint. With several processes all of them call every method, and the directory is one they share.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        read_only: bool = False,
        shared: bool = True,
    ):
        """Opens the directory, or makes it, and removes what was cut off.

        Args:
            directory: for nothing else.
            keep_last: how many checkpoints to keep, all by default.
            keep_every: those whose step is a multiple of it are kept all the same.
            read_only: neither makes nor removes anything, for a look at a run that is going on.
            shared: whether several processes share the directory; if not, each writes its own part of a checkpoint to
                its own, in files that can be put together.

        Raises:
            OSError: the directory cannot be made, or is not there and should be.
        """
        self.directory = Path(directory).resolve()
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
        elif not self.directory.is_dir():
            raise FileNotFoundError(f"{self.directory} is not there, expected a directory of checkpoints")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last,
            keep_period=keep_every,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
        )
        hosts = ocp.options.MultiprocessingOptions(primary_host=0 if shared else None)
        options.multiprocessing_options = hosts
        handlers = {
            "state": ocp.StandardCheckpointHandler(multiprocessing_options=hosts, use_ocdbt=shared),
            "note": ocp.JsonCheckpointHandler(multiprocessing_options=hosts),
        }
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.closing(self._manager), contextlib.suppress(*(() if error is None else (OSError,))):
            self.wait()

    @property
    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, in order."""
        return sorted(self._manager.all_steps())

    @property
    def location(self) -> str:
        """Where they are."""
        return str(self.directory)

    @property
    def latest(self) -> str:
        """Where the last checkpoint is; there must be one."""
        return f"{self.location}/{self.steps[-1]}"

    def save(self, step: int, state: object, note: dict[str, Any]) -> None:
        """Writes a checkpoint in the background; the state's buffers are free when this returns.

        Args:
            step: after the last one.
            state: a pytree of arrays; modules of flax.nnx may be in it.
            note: values for JSON.

        Raises:
            OSError: this checkpoint, or one before, cannot be written; those before stay as they are.
        """
        items = ocp.args.Composite(state=ocp.args.StandardSave(named_arrays(state)), note=ocp.args.JsonSave(note))
        with failing_to_write():
            self._manager.save(step, args=items)

    def delete_from(self, step: int) -> None:
        """Deletes the checkpoints of this step and later ones.

        Raises:
            OSError: one cannot be deleted.
        """
        for each in [each for each in self.steps if each >= step]:
            self._manager.delete(each)

    def wait(self) -> None:
        """Returns when every checkpoint is on disk.

        Raises:
            OSError: as `save`.
        """
        with failing_to_write():
            self._manager.wait_until_finished()

    def restore(self, step: int, like: Tree) -> tuple[Tree, dict[str, Any]]:
        """A state, bit for bit, and its note.

        Args:
            step: one of `steps`.
            like: as in `store.restore_state`.

        Raises:
            FileNotFoundError: there is no checkpoint of this step.
            ValueError: it holds other arrays, all of which are listed, or cannot be read.
        """
        target = abstract_arrays(like)
        check_stored(self._stored(step), target, f"{self.location}/{step}")
        items = ocp.args.Composite(state=ocp.args.StandardRestore(target), note=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        return with_arrays(like, restored["state"]), restored["note"]

    def restore_part(self, step: int, like: Tree, name: str) -> Tree:
        """The part of a state that is its attribute `name`, bit for bit; nothing else is read.

        Arguments and errors as for `restore`.
        """
        target = {f"{name}.{path}": array for path, array in abstract_arrays(like).items()}
        stored = {path: array for path, array in self._stored(step).items() if path.startswith(f"{name}.")}
        check_stored(stored, target, f"{self.location}/{step}")
        arguments = ocp.args.PyTreeRestore(
            target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
        )
        with ocp.PyTreeCheckpointer() as checkpointer:
            arrays = checkpointer.restore(self.directory / str(step) / "state", args=arguments)
        return with_arrays(like, {path.removeprefix(f"{name}."): array for path, array in arrays.items()})

    def _stored(self, step: int) -> Mapping[str, Any]:
        """What has the shape and the dtype of each array in a checkpoint."""
        if step not in self.steps:
            raise FileNotFoundError(f"no checkpoint of step {step} in {self.location}, which has {self.steps}")
        stored = self._manager.item_metadata(step)["state"]
        if stored is None:
            raise ValueError(f"{self.location}/{step} is not a checkpoint: expected a directory 'state' in it")
        return stored


@contextlib.contextmanager
def failing_to_write() -> Iterator[None]:
    """Has errors of Orbax and tensorstore be OSErrors."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # of tensorstore, a full disk is a ValueError
        raise OSError(f"a checkpoint could not be written: {error}") from error
