"""Files: texts and JSON that are read as others write them, and files and directories that are never half-written."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def read_text(path: Path) -> str:
    """A text in UTF-8, without the byte order mark that some programs begin it with.

    Raises:
        ValueError: it is not UTF-8.
        OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def read_json(path: Path) -> Any:
    """What a file holds in JSON.

    Raises:
        ValueError: it is not valid.
        OSError: it cannot be read.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` fill a temporary file beside `path`, then renames it to `path`.

    The temporary name keeps the suffix, by which some writers choose a format. Nothing is left of it on failure.
    """
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """Nested tables and lists for JSON, which has no numbers that are not finite: None in their place."""
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def user_caches() -> Path:
    """The directory of this package in the user's cache directory; `XDG_CACHE_HOME` is respected."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zamba2-jax"


@contextlib.contextmanager
def exclusively(path: Path, busy: str) -> Iterator[None]:
    """Holds a lock file, which is made if need be, against the other processes of this machine.

    Raises:
        BlockingIOError: another process holds it; says `busy`.
        OSError: it cannot be written.
    """
    import fcntl  # which only Unix has

    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(busy) from None
        yield


def write_json(path: Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Writes an object or a list as JSON, whole or not at all."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_directory_atomically(path: Path, write: Callable[[Path], T]) -> T:
    """Has `write` fill a temporary directory beside `path`, renames it to `path`, and returns what `write` returned.

    Nothing is left of it on failure, unless the process is killed.

    Raises:
        FileExistsError: `path` is there and not an empty directory, or another process is writing it, or was killed
            while it was.
    """
    path = path.resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} is there already: expected a new or an empty directory")
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.mkdir(parents=True)
    except FileExistsError:
        raise FileExistsError(
            f"{temporary} is there: another process is writing {path}, or was killed; if so, delete it"
        ) from None
    try:
        result = write(temporary)
        temporary.rename(path)
        return result
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
