"""Directories of object stores, through fsspec: names, transfers, and errors that say where.

A file of a store appears whole or not at all. A directory does not: who fills one writes last what says that it is
complete.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec

TRANSFERS = 16
"""Files on their way at a time."""

_EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the URL of something in an object store.

    Raises:
        ValueError: it begins as such a URL, but has not two slashes.
    """
    name = os.fspath(path)
    if "://" in name:
        return True
    scheme, colon, rest = name.partition(":")
    if colon and scheme in _EXTRAS:
        raise ValueError(f"{name}: expected {scheme}://{rest.lstrip('/')}, or a local path")
    return False


class RemoteDirectory:
    """A directory of an object store. Credentials, endpoint and region are those that the store's client finds.

    Every method raises an OSError that names the URL when the store refuses or cannot be reached: FileNotFoundError for
    a file or bucket that is not there, PermissionError for what is not allowed.
    """

    def __init__(self, url: str):
        """By its URL; asks the store nothing.

        Raises:
            ValueError: there is no such kind of store, or the package for it is not installed.
        """
        self.url = url.rstrip("/")
        scheme = url.split("://")[0]
        try:
            # Other processes write, too: a listing is never remembered.
            self._files, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            extra = _EXTRAS.get(scheme)
            advice = f": pip install 'zamba2-jax[{extra}]'" if extra else ""
            raise ValueError(f"{url}: {scheme}:// takes a package that is not installed{advice} ({error})") from error
        except ValueError as error:
            raise ValueError(f"{url}: expected a local path, s3:// or gs:// ({error})") from error
        self._root = self._root.rstrip("/")

    def __truediv__(self, name: str) -> "RemoteDirectory":
        return RemoteDirectory(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rsplit("/", 1)[1]

    def sizes(self) -> dict[str, int]:
        """Bytes of every file in it and below, by its name in the directory; empty where there is nothing."""
        return {name: int(found["size"]) for name, found in self._found().items()}

    def versions(self) -> dict[str, str]:
        """What changes with the content of every file, as far as the store tells, by name; of a file its own by ""."""
        if self.is_file():
            with _at(self.url):
                return {"": _version(self._files.info(self._root))}
        return {name: _version(found) for name, found in self._found().items()}

    def is_file(self) -> bool:
        """Whether the URL is that of a file."""
        with _at(self.url):
            return self._files.isfile(self._root)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """A file, or its bytes from `start` to `stop`."""
        with _at(f"{self.url}/{name}"):
            return self._files.cat_file(self._path(name), start=start, end=stop)

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, in place of one that is there."""
        with _at(f"{self.url}/{name}"):
            self._files.pipe_file(self._path(name), content)

    def upload(self, files: Mapping[str, Path]) -> None:
        """Copies local files here, by the names they are to have."""

        def put(name: str) -> None:
            with _at(f"{self.url}/{name}"):
                self._files.put_file(str(files[name]), self._path(name))

        _each(put, files)

    def download(self, files: Mapping[str, Path]) -> None:
        """Copies files from here, by name, to local ones, which appear whole or not at all."""

        def get(name: str) -> None:
            target = files[name]
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.partial")
            try:
                with _at(f"{self.url}/{name}"):
                    self._files.get_file(self._path(name), str(partial))
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)

        _each(get, files)

    def delete(self, names: Iterable[str]) -> None:
        """Deletes files; one that is gone already is as good."""

        def remove(name: str) -> None:
            with contextlib.suppress(FileNotFoundError), _at(f"{self.url}/{name}"):
                self._files.rm_file(self._path(name))

        _each(remove, names)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _found(self) -> dict[str, dict[str, Any]]:
        with _at(self.url):
            found = self._files.find(self._root, detail=True)
        return {name.removeprefix(f"{self._root}/"): details for name, details in found.items()}


def local_files(directory: Path) -> dict[str, Path]:
    """Every file in a local directory and below, by its name there."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path for path in files}


def _version(details: Mapping[str, Any]) -> str:
    return repr([str(details.get(mark)) for mark in ("size", "ETag", "etag", "mtime", "updated", "created")])


def _each(work: Callable[[str], None], names: Iterable[str]) -> None:
    """Does it for every name, several at a time; the first error ends it."""
    executor = ThreadPoolExecutor(TRANSFERS)
    try:
        for _ in executor.map(work, names):
            pass
    finally:
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _at(url: str) -> Iterator[None]:
    """Has errors name the URL, and be OSErrors, which those of some clients are not."""
    try:
        yield
    except Exception as error:
        kinds = (FileNotFoundError, PermissionError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), OSError)
        raise kind(f"{url}: {error or type(error).__name__}") from error
