"""Runs the notebooks of this directory and stores their outputs: `make notebooks`."""

from pathlib import Path

import nbclient
import nbformat


def run(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh kernel, started beside it.

    Nothing in it tells when it ran, or in which environment: neither times of cells, nor what libraries warn of.
    """
    notebook = nbformat.read(path, as_version=4)
    metadata = notebook.metadata.copy()
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    notebook.metadata = metadata
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    for path in sorted(Path(__file__).parent.glob("*.ipynb")):
        nbformat.write(run(path), path)
