"""Imports point one way, and PyTorch stays behind the one door it has."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

import zamba2_jax

PACKAGE = pathlib.Path(zamba2_jax.__file__).parent
ORDER = "config typing ops sharding model checkpoint generate train evaluate plan parity cli".split()
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path):
    """Absolute dotted names a file imports, anywhere in it; `from a import b` counts as a.b."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def floor_of(name):
    """Where a dotted name of the package stands in ORDER. The package's own names stand where they come from."""
    part = name.removeprefix("zamba2_jax").strip(".").split(".")[0]
    if part in ORDER:
        return ORDER.index(part)
    own = [other for other in imported(PACKAGE / "__init__.py") if other.endswith(f".{part}") or not part]
    assert own, f"{name} is in no part of the package that ORDER knows"
    return max(map(floor_of, own))


def test_every_part_of_the_package_has_its_place():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert parts - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    here = len(ORDER) if part == "__init__" else ORDER.index(part)
    roots = {name.split(".")[0] for name in imported(path)}
    assert not roots & {"experiments", "notebooks", "tests"}
    assert part == "parity" or not roots & {"torch", "transformers"}
    above = [name for name in imported(path) if name.split(".")[0] == "zamba2_jax" and floor_of(name) > here]
    assert not above, f"{part} imports {above}, which stand above it in {ORDER}"


def test_importing_the_package_loads_no_pytorch():
    code = "import sys, zamba2_jax; print({'torch', 'transformers'} & set(sys.modules))"
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "set()"
