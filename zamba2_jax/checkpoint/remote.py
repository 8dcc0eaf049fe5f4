"""Checkpoints in an object store: written on this machine, copied in the background, complete by a file written last.

A store knows no renaming. The files of checkpoint 12 are in the directory 12; of n processes, process i writes its
part, and then `commit-<i>-of-<n>.json`, which names the files of the part and their sizes. A checkpoint is one when all
n of these are there, and is none any more when the first of them is deleted.
"""

import json
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from zamba2_jax.checkpoint.history import Checkpoints, failing_to_write
from zamba2_jax.storage.remote import RemoteDirectory, local_files

COMMIT_SECONDS = 600
"""How long a process waits for the parts of the others."""
_COMMIT = re.compile(r"(\d+)/commit-(\d+)-of-(\d+)\.json")
_POLL_SECONDS = 0.5


class RemoteCheckpoints(Checkpoints):
    """As `Checkpoints`, in an object store.

    A checkpoint that is still on its way holds up the next one, not the steps between. With several processes each
    copies its own part, and reads all of a checkpoint.
    """

    def __init__(
        self,
        remote: RemoteDirectory,
        staging: Path,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        read_only: bool = False,
        before_commit: Callable[[], object] = lambda: None,
    ):
        """Finds what is there, and deletes what was cut off.

        Args:
            remote: for nothing else.
            staging: a local directory, for nothing else, in which there is room for two checkpoints.
            keep_last, keep_every, read_only: as for `Checkpoints`.
            before_commit: is called before a checkpoint becomes one.

        Raises:
            OSError: the store refuses, or cannot be reached.
        """
        self._remote, self._before_commit = remote, before_commit
        self._keep_last, self._keep_every = keep_last, keep_every
        files = remote.sizes()
        self._committed = _complete(files)
        if not read_only and jax.process_index() == 0:
            cut_off = [name for name in files if re.match(r"\d+/", name) and _step(name) not in self._committed]
            remote.delete(cut_off)
        self._fetched: set[int] = set()
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1)
        super().__init__(staging, keep_last=1, shared=jax.process_count() == 1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            self._thread.shutdown()

    @property
    def location(self) -> str:
        """The URL."""
        return self._remote.url

    @property
    def steps(self) -> list[int]:
        """The steps that there are complete checkpoints of, in order."""
        return sorted(self._committed)

    def save(self, step: int, state: object, note: dict[str, Any]) -> None:
        """As `Checkpoints.save`; waits for the checkpoint before."""
        self.wait()
        super().save(step, state, note)
        self._pending = self._thread.submit(self._publish, step)

    def delete_from(self, step: int) -> None:
        """As `Checkpoints.delete_from`; nothing of them may be in staging."""
        for each in [each for each in self.steps if each >= step]:
            self._delete(each)

    def wait(self) -> None:
        """Returns when every checkpoint is in the store.

        Raises:
            OSError: as `save`.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            with failing_to_write():
                pending.result()

    def _stored(self, step: int) -> Mapping[str, Any]:
        if step in self._committed and step not in self._fetched:
            self._fetch(step)
        return super()._stored(step)

    def _publish(self, step: int) -> None:
        """Copies this process's part of a checkpoint from staging, and waits for those of the others."""
        super().wait()
        files = local_files(self.directory / str(step))
        index, count = jax.process_index(), jax.process_count()
        if index > 0:  # what is not of arrays the first process writes
            files = {n: f for n, f in files.items() if n.startswith("state/") and not f.name.startswith("_")}
        remote = self._remote / str(step)
        remote.upload(files)
        self._before_commit()
        listed = json.dumps({"files": {name: file.stat().st_size for name, file in files.items()}})
        remote.write(f"commit-{index}-of-{count}.json", listed.encode())
        deadline = time.monotonic() + COMMIT_SECONDS
        while step not in _complete({f"{step}/{name}": size for name, size in remote.sizes().items()}):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{remote}: the parts of other processes are missing after {COMMIT_SECONDS} s")
            time.sleep(_POLL_SECONDS)
        self._committed.add(step)
        if index == 0:
            self._delete_old()
        else:
            self._committed -= set(self._old())

    def _old(self) -> list[int]:
        """The steps that are not to be kept."""
        if self._keep_last is None:
            return []
        every = self._keep_every
        return [step for step in self.steps[: -self._keep_last] if every is None or step % every]

    def _delete_old(self) -> None:
        for step in self._old():
            self._delete(step)

    def _delete(self, step: int) -> None:
        """Forgets a checkpoint; the first process deletes it."""
        self._committed.discard(step)
        if jax.process_index() > 0:
            return
        remote = self._remote / str(step)
        names = sorted(remote.sizes(), key=lambda name: not name.startswith("commit-"))
        commits = [name for name in names if name.startswith("commit-")]
        remote.delete(commits)
        remote.delete(names[len(commits) :])

    def _fetch(self, step: int) -> None:
        """Copies a checkpoint to staging.

        Raises:
            ValueError: a file is not as it was written.
        """
        remote, target = self._remote / str(step), self.directory / str(step)
        sizes = remote.sizes()
        commits = [name for name in sizes if name.startswith("commit-")]
        expected = {name: size for commit in commits for name, size in json.loads(remote.read(commit))["files"].items()}
        for name, size in expected.items():
            if sizes.get(name) != size:
                raise ValueError(f"{remote}/{name}: {sizes.get(name)} bytes, expected {size}: it was changed")
        partial = target.with_name(f".{step}.partial")
        remote.download({name: partial / name for name in expected})
        partial.rename(target)
        self._fetched.add(step)
        self._manager.reload()


def _step(name: str) -> int:
    return int(name.split("/")[0])


def _complete(files: Mapping[str, int]) -> set[int]:
    """The steps of which every part is there, by the names of all files."""
    parts: dict[tuple[int, int], set[int]] = {}
    for found in filter(None, map(_COMMIT.fullmatch, files)):
        step, index, count = map(int, found.groups())
        parts.setdefault((step, count), set()).add(index)
    return {step for (step, count), there in parts.items() if there == set(range(count))}
