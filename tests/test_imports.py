"""Imports point one way, and PyTorch stays behind the one door it has."""

import ast
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import zamba2_jax

PACKAGE = pathlib.Path(zamba2_jax.__file__).parent
ORDER = """
    choices files storage typing ops parallel nn models interpret checkpoint text data inference train evaluate check
    parity plan lab cli
""".split()
TOP = ("__init__", "__main__")
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path):
    """Absolute dotted names a file imports, anywhere in it; `from a import b` counts as a.b, and so does "a.b"."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and re.fullmatch(r"zamba2_jax(\.\w+)+", str(node.value)):
            names.append(node.value)
    return names


OWN = [name for name in imported(PACKAGE / "__init__.py") if name.startswith("zamba2_jax.")]


def floor_of(name):
    """Where a dotted name of the package stands in ORDER. The package's own names stand where they come from."""
    part = name.removeprefix("zamba2_jax").strip(".").split(".")[0]
    if part in ORDER:
        return ORDER.index(part)
    own = [other for other in OWN if other.endswith(f".{part}") or not part]
    assert own, f"{name} is in no part of the package that ORDER knows"
    return max(map(floor_of, own))


def test_every_part_of_the_package_has_its_place():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert parts - set(TOP) == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    here = len(ORDER) if part in TOP else ORDER.index(part)
    roots = {name.split(".")[0] for name in imported(path)}
    assert not roots & {"experiments", "notebooks", "tests"}
    assert part == "parity" or not roots & {"torch", "transformers"}
    above = [name for name in imported(path) if name.split(".")[0] == "zamba2_jax" and floor_of(name) > here]
    assert not above, f"{part} imports {above}, which stand above it in {ORDER}"


def test_the_names_of_the_package_are_those_that_type_checkers_see():
    assert sorted(zamba2_jax.__all__) == sorted(name.rsplit(".")[-1] for name in OWN)
    for name in OWN:
        module, _, attribute = name.rpartition(".")
        assert getattr(zamba2_jax, attribute) is getattr(importlib.import_module(module), attribute)
    assert set(zamba2_jax.__all__) <= set(dir(zamba2_jax))
    everything = {}
    exec("from zamba2_jax import *", everything)
    assert set(zamba2_jax.__all__) <= set(everything)
    with pytest.raises(AttributeError, match="module 'zamba2_jax' has no attribute 'nothing'"):
        _ = zamba2_jax.nothing


HEAVY = """
    array_record flax grain huggingface_hub jax jaxlib matplotlib numpy optax orbax safetensors tokenizers torch
    transformers
""".split()

HELP = """
import contextlib, io, json, sys
import zamba2_jax
from zamba2_jax.cli.main import COMMANDS, main
loaded = {}
for words in [[], *([name] for name in COMMANDS)]:
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main([*words, "--help"])
    loaded[" ".join(words)] = [len(printed.getvalue()) > 100, sorted(set(sys.argv[1:]) & set(sys.modules))]
print(json.dumps(loaded))
"""


def in_python(*arguments):
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, env=env).stdout


def test_help_loads_nothing_that_takes_long():
    for words, (helped, loaded) in json.loads(in_python("-c", HELP, *HEAVY)).items():
        assert helped
        assert not loaded, f"zamba2 {words} --help loads {loaded}"


@pytest.mark.parametrize("module", ["zamba2_jax", "zamba2_jax.cli.main"])
def test_the_package_runs_as_a_module(module):
    assert in_python("-m", module, "--help").startswith("usage: zamba2 ")


def test_all_of_the_package_loads_no_pytorch():
    code = "import sys; from zamba2_jax import *; print({'torch', 'transformers'} & set(sys.modules))"
    assert in_python("-c", code).strip() == "set()"
