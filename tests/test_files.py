import json
import math

import pytest

from zamba2_jax.files import exclusively, finite, write_atomically, write_directory_atomically


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_directory_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "out"
    write_directory_atomically(path, lambda temporary: (temporary / "a").write_text("x"))
    assert [entry.name for entry in path.iterdir()] == ["a"]
    with pytest.raises(FileExistsError, match="is there already"):
        write_directory_atomically(path, lambda temporary: None)
    assert (path / "a").read_text() == "x"

    def fail(temporary):
        (temporary / "a").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_directory_atomically(tmp_path / "other", fail)
    assert [entry.name for entry in tmp_path.iterdir()] == ["new"]
    (tmp_path / ".other.partial").mkdir()
    with pytest.raises(FileExistsError, match=r"another process is writing .*other, or was killed; if so, delete it"):
        write_directory_atomically(tmp_path / "other", lambda temporary: None)


def test_numbers_that_are_not_finite_are_none():
    value = {"a": (1.5, math.nan, [math.inf, 2]), "b": {"c": -math.inf, "d": "text"}}
    assert finite(value) == {"a": [1.5, None, [None, 2]], "b": {"c": None, "d": "text"}}
    json.dumps(finite(value), allow_nan=False)


def test_a_lock_is_held_once(tmp_path):
    lock = tmp_path / "lock"
    with exclusively(lock, "busy"), pytest.raises(BlockingIOError, match="busy"), exclusively(lock, "busy"):
        pass
    with exclusively(tmp_path / "lock", "busy"):
        pass
