"""The notebooks run on the committed results, and show what they were committed with."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
LARGEST = 10_000_000  # bytes of committed results


def outputs(cell):
    """The outputs of a cell, without warnings: texts, and of pictures that there is one."""
    shown = [output.get("data", output) for output in cell.get("outputs", []) if output.get("name") != "stderr"]
    return [{kind: data if kind == "text/markdown" else ... for kind, data in one.items()} for one in shown]


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's packages
@pytest.mark.parametrize("name", ["curves", "table", "pareto", "gallery", "exact_target"])
def test_a_notebook_shows_what_it_was_committed_with(name):
    committed = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None) if cell.cell_type != "code" else cell.update(outputs=[])
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    assert [outputs(cell) for cell in notebook.cells] == [outputs(cell) for cell in committed.cells]
    kinds = {kind for cell in committed.cells for one in outputs(cell) for kind in one}
    assert "text/markdown" in kinds
    assert name == "table" or "image/png" in kinds


def test_the_committed_results_are_small():
    assert 0 < sum(file.stat().st_size for file in (FOLDER / "results").rglob("*")) < LARGEST
