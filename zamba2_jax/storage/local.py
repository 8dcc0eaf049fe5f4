"""Local stand-ins for what is in an object store: copies to read from, and directories that are copied there."""

import contextlib
import fnmatch
import hashlib
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from zamba2_jax.files import exclusively, user_caches, write_directory_atomically
from zamba2_jax.storage.remote import RemoteDirectory, is_remote, local_files

T = TypeVar("T")

_PROBE = ".probe"

MIRROR_SECONDS = 30
"""Between copies of what has changed in the directory of a run."""


def cache_directory() -> Path:
    """Where this user's copies of remote files are kept."""
    return user_caches() / "storage"


def local_copy(source: str | os.PathLike[str], patterns: Sequence[str]) -> str | os.PathLike[str]:
    """A local copy of a file or directory, kept until the remote one changes; what is local itself is given back.

    Args:
        source: a path, or a URL.
        patterns: of the files of a directory to copy, none of directories within; without, a file is expected.

    Raises:
        FileNotFoundError: there is nothing at the URL.
        OSError: the store refuses, or cannot be reached.
    """
    if not is_remote(source):
        return source
    remote = RemoteDirectory(os.fspath(source))
    versions = {name: version for name, version in remote.versions().items() if _matches(name, patterns)}
    if not versions:
        raise FileNotFoundError(f"{remote}: {'it holds no ' + ', '.join(patterns) if patterns else 'no such file'}")
    key = hashlib.sha256(f"{remote} {sorted(versions.items())}".encode()).hexdigest()[:32]
    target = cache_directory() / "copies" / key / remote.name
    if not target.exists():
        partial = target.with_name(f".{remote.name}.{secrets.token_hex(8)}")
        try:
            remote.download({name: partial / name if name else partial for name in versions})
            with contextlib.suppress(OSError):  # another process was faster
                partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file is to be copied: one that is named itself, or of a directory one at its top that fits."""
    return not name or ("/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def write_directory(path: str | os.PathLike[str], write: Callable[[Path], T], *, last: str) -> T:
    """Has `write` fill a new directory, local or remote, which is complete when it holds the file `last`.

    A local one appears whole or not at all. A remote one is filled on this machine first; its file `last` is written
    when all others are there. On failure what is there of it is deleted, unless the process is killed.

    Raises:
        FileExistsError: there is something already; as `files.write_directory_atomically`.
        OSError: as `write`, or the store refuses, or cannot be reached.
    """
    if not is_remote(path):
        return write_directory_atomically(Path(path), write)
    check_new(path)
    remote = RemoteDirectory(os.fspath(path))
    with tempfile.TemporaryDirectory(prefix="zamba2-jax-") as name:
        directory = Path(name)
        result = write(directory)
        files = local_files(directory)
        try:
            remote.upload({name: file for name, file in files.items() if name != last})
            remote.upload({last: files[last]})
        except BaseException:
            with contextlib.suppress(OSError):
                remote.delete(files)
            raise
        return result


def check_new(path: str | os.PathLike[str]) -> None:
    """Checks, before long work, that a directory is new or empty, and that a remote one can be written.

    Raises:
        FileExistsError: it holds something.
        OSError: the store refuses, or cannot be reached.
    """
    if is_remote(path):
        remote = RemoteDirectory(os.fspath(path))
        holds = bool(remote.sizes())
        if not holds:
            remote.write(_PROBE, b"")
            remote.delete([_PROBE])
    else:
        holds = Path(path).exists() and not (Path(path).is_dir() and not any(Path(path).iterdir()))
    if holds:
        raise FileExistsError(f"{path} is there already: expected a new or an empty directory")


@contextlib.contextmanager
def scratch(url: str, number: int = 0) -> Iterator[Path]:
    """An empty local directory for what is at a URL, for one process of this machine and user at a time.

    It lies where `tempfile.gettempdir()` says, and is deleted at the end, or, after a kill, at the next beginning.

    Args:
        url: of the remote directory.
        number: of the process, where several of a machine work at one URL together.

    Raises:
        BlockingIOError: another process of this machine is at it.
        OSError: the directory cannot be made.
    """
    home = Path(tempfile.gettempdir()) / f"zamba2-jax-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    if home.stat().st_uid != os.getuid():
        raise PermissionError(f"{home} belongs to another user: expected a directory of our own")
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{number}"
    with exclusively(home / f"{name}.lock", f"another process of this machine is running in {url}"):
        shutil.rmtree(home / name, ignore_errors=True)
        (home / name).mkdir()
        try:
            yield home / name
        finally:
            shutil.rmtree(home / name, ignore_errors=True)


@contextlib.contextmanager
def growing_file(path: str | os.PathLike[str], beside: str) -> Iterator[Path]:
    """A local file to add to: the one at `path`, or a copy of a remote one that is copied back as it grows.

    Args:
        path: local, or a URL.
        beside: name of a file in the same directory that goes with it, and is copied back before it.

    Raises:
        OSError: as `scratch`; or the store refuses, or cannot be reached.
    """
    if not is_remote(path):
        yield Path(path)
        return
    url, _, name = os.fspath(path).rpartition("/")
    remote = RemoteDirectory(url)
    with scratch(os.fspath(path)) as directory:
        there = [file for file in (name, beside) if (remote / file).is_file()]
        remote.download({file: directory / file for file in there})
        with Mirror(directory, remote, last=name):
            yield directory / name


class Mirror:
    """Copies what changes in a local directory to a remote one, in the background; a context manager.

    At its end all is copied.
    """

    def __init__(self, directory: Path, remote: RemoteDirectory, *, last: str, leave_out: str | None = None):
        """What is in the directory now is there already.

        Args:
            directory: the local one.
            remote: the other.
            last: name of the file that is copied after those that change with it.
            leave_out: name of a directory within that is not copied.
        """
        self._directory, self._remote, self._leave_out, self._last = directory, remote, leave_out, last
        self._copied = self._marks()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Mirror":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(*(() if error is None else (OSError,))):
            self.copy()

    def copy(self) -> None:
        """Copies what has changed since the last time.

        Raises:
            OSError: the store refuses, or cannot be reached.
        """
        with self._lock:
            marks = self._marks()
            changed = {n: self._directory / n for n, mark in marks.items() if self._copied.get(n) != mark}
            last = {self._last: changed.pop(self._last)} if self._last in changed else {}
            for files in (changed, last):
                self._remote.upload(files)
                self._copied |= {name: marks[name] for name in files}

    def _follow(self) -> None:
        while not self._ended.wait(MIRROR_SECONDS):
            with contextlib.suppress(OSError):  # whoever must know asks for a copy, and is told
                self.copy()

    def _marks(self) -> dict[str, tuple[int, int]]:
        """What changes with each file that is not hidden."""
        marks = {}
        for name, path in local_files(self._directory).items():
            if name.split("/")[0] != self._leave_out and not any(part.startswith(".") for part in name.split("/")):
                with contextlib.suppress(FileNotFoundError):  # one that was for a moment only
                    stat = path.stat()
                    marks[name] = (stat.st_mtime_ns, stat.st_size)
        return marks
