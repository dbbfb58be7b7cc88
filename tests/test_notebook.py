"""The quickstart notebook runs, and its kept outputs are those of a run."""

from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from notebooks import run_notebook

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(notebook: NotebookNode) -> str:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_outputs_are_kept_and_name_no_machine() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert sum("image/png" in output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs) >= 4
    assert "% after" in text_of(notebook)
    assert "site-packages" not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_notebook_runs_and_learns(tmp_path: Path) -> None:
    text = text_of(run_notebook(NOTEBOOK, tmp_path))
    before, after = text.partition("test questions: ")[2].split(" % before, ")
    assert float(before) < 60
    assert float(after.partition(" %")[0]) > 85
