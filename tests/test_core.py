"""The tests that `make check` runs: core.txt names files, and tests of files, a line each."""

from pathlib import Path

TESTS = Path(__file__).parent


def test_the_core_is_there_and_touches_every_room():
    lines = (TESTS / "core.txt").read_text().split()
    for line in lines:
        file, _, name = line.partition("::")
        assert f"def {name}" in (TESTS.parent / file).read_text(), line
    rooms = {path.parent.relative_to(TESTS.parent) for path in TESTS.rglob("test_*.py")}
    assert {Path(line.partition("::")[0]).parent for line in lines} == rooms
