"""The notebooks run on the committed results, and show what they were committed with. The quickstart trains."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from nabla_gfn_jax.runs import loras

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


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_quickstart_finetunes_and_opens_the_result_in_diffusers(tmp_path):
    """With one epoch, and with the texts and pictures of the same cells as in the committed notebook."""
    committed = nbformat.read(FOLDER / "quickstart.ipynb", as_version=4)
    notebook = nbformat.read(FOLDER / "quickstart.ipynb", as_version=4)
    (training,) = [cell for cell in notebook.cells if "api.finetune" in cell.source]
    length, training.source = (
        training.source.splitlines()[0],
        re.sub(r"^epochs, workdir = .*", f"epochs, workdir = 1, Path({str(tmp_path / 'run')!r})", training.source),
    )
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(FOLDER)}}).execute()
    assert re.fullmatch(r'epochs, workdir = [5-9], Path\("\.\./runs/quickstart"\)', length)
    assert list(loras.saved(tmp_path / "run")) == [4]
    printed = "".join(output.text for output in training.outputs if output.get("name") == "stdout")
    assert re.fullmatch(r"(epoch [012]: mean log R 0\.\d{3}\n){3}", printed)
    shown = [[pictures(cell) for cell in of.cells] for of in (notebook, committed)]
    assert shown[0] == shown[1]
    assert sum(shown[0]) == 5


def pictures(cell) -> int:
    """The number of pictures that a cell shows."""
    return sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


def test_the_committed_results_are_small():
    assert 0 < sum(file.stat().st_size for file in (FOLDER / "results").rglob("*")) < LARGEST
