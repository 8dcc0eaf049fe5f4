"""docs/xla-notes.md and the code that links to it name the same entries."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"docs/xla-notes\.md: ([a-z0-9-]+(?:, [a-z0-9-]+)*)")


def test_every_link_has_its_entry_and_every_entry_a_link():
    entries = re.findall(r"^### (.+)$", (ROOT / "docs" / "xla-notes.md").read_text(), re.MULTILINE)
    sources = [ROOT / "Makefile", *(ROOT / "zamba2_jax").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    links = {name for path in sources for found in LINK.findall(path.read_text()) for name in found.split(", ")}
    assert len(set(entries)) == len(entries)
    assert links == set(entries)
