"""The benchmarks import what the pipeline has."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "benchmarks"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.stem != "common")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_benchmark_imports(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    if "lmdb" in script.read_text():
        pytest.importorskip("lmdb")
    assert "main" in runpy.run_path(str(script), run_name="imported")
