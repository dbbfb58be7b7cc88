"""Run a notebook; `python tests/support/notebooks.py docs/quickstart.ipynb` runs it and keeps its new outputs."""

import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

_LIBRARY_WARNING = re.compile(r"^\S*site-packages\S*: \w*Warning: .*\n(  .*\n)?", re.M)


def run_notebook(path: Path, folder: Path) -> NotebookNode:
    """Run all cells in `folder`; raise nbclient's `CellExecutionError` at the first that fails."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=900, coalesce_streams=True, resources=resources).execute()
    return notebook


def main(path: Path) -> None:
    with TemporaryDirectory() as name:
        notebook = run_notebook(path, Path(name))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        for output in cell.get("outputs", []):
            if output.output_type == "stream":  # paths of the machine are nobody else's
                output.text = _LIBRARY_WARNING.sub("", output.text)
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("text", "-").strip()]
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
