import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="notebooks are run with nbclient, which is not installed")

from notebooks.run import run

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
NEEDS_TORCH = {"quickstart"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_from_the_first_cell_to_the_last(path, monkeypatch):
    monkeypatch.setenv("QUICK", "1")  # to those that train many models
    if path.stem in NEEDS_TORCH and importlib.util.find_spec("torch") is None:
        pytest.skip("the notebook compares with PyTorch, which is not installed")
    notebook = run(path)
    assert any(output.get("data", {}).get("image/png") for cell in notebook.cells for output in cell.get("outputs", []))
