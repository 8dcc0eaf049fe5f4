"""What the commands that print tables and write their numbers share."""

import sys
from pathlib import Path

from rich.console import Console

WIDTH = 120
"""Of the tables where there is no terminal to fill."""


def table_console() -> Console:
    """Standard output, wide enough for tables where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def check_json_option(path: Path | None) -> None:
    """Whether the file of an option --json can be written, before the work that gives its numbers.

    Raises:
        ValueError: there is no directory for it.
    """
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"--json {path}: there is no directory {path.parent}")
