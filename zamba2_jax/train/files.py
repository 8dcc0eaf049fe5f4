"""Files that are never half-written."""

from collections.abc import Callable
from pathlib import Path


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
