"""Imports run one way: cli -> stages -> parts -> cache."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = {"precompute", "train", "evaluate", "ask", "export"}
RUNNERS = {"cli", "quickstart", "repair", "grid"}


def imports_of(module: Path) -> set[str]:
    """Every module that `module` imports from, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.name}: imports are absolute"
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def pipeline_modules() -> list[Path]:
    return sorted((ROOT / "pipeline").rglob("*.py"))


@pytest.mark.parametrize("module", sorted((ROOT / "cache").glob("*.py")), ids=lambda path: path.stem)
def test_the_cache_knows_nothing_of_the_models(module: Path) -> None:
    outside = {name.split(".")[0] for name in imports_of(module)} & {"torch", "transformers", "peft", "pipeline"}
    assert not outside
    if module.stem != "hdf5":
        assert "h5py" not in imports_of(module)


@pytest.mark.parametrize("module", pipeline_modules(), ids=lambda path: path.stem)
def test_parts_import_no_stage_and_nothing_imports_the_command(module: Path) -> None:
    imported = {name.removeprefix("pipeline.") for name in imports_of(module) if name.startswith("pipeline.")}
    assert "cli" not in imported
    if module.stem not in RUNNERS:
        assert not imported & (STAGES | RUNNERS)


def test_every_module_of_the_package_is_seen() -> None:
    assert len(pipeline_modules()) > 15


def test_the_command_imports_no_stage_before_it_is_asked_to() -> None:
    top = ast.parse((ROOT / "pipeline" / "cli.py").read_text()).body
    at_the_top = [node.module for node in top if isinstance(node, ast.ImportFrom)]
    slow = [name for name in at_the_top if name and name.startswith(("pipeline", "cache", "torch", "transformers"))]
    assert slow == ["pipeline.terminal"]
