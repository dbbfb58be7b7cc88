"""Imports run one way: cli -> commands -> training, answers -> batches, encoding -> data, blip2 -> common, cache."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = (
    {"cache"},
    {"common"},
    {"overrides"},
    {"config_sections"},
    {"config_data"},
    {"config"},
    {"blip2"},
    {"data"},
    {"encoding"},
    {"batches", "runs"},
    {"answers"},
    {"training"},
    {"commands"},
    {"__init__", "cli_runner"},
    {"cli_cache"},
    {"cli"},
)
"""Rooms, which are packages or top-level modules of pipeline/, from the lowest. A room imports only from lower ones."""
MAX_LINES = 350
MAX_TOP_LEVEL_MODULES = 8
MODULES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "cache").glob("*.py")])


def name_of(module: Path) -> str:
    return ".".join(module.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(module: Path) -> set[str]:
    """Return every module that `module` imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.name}: use absolute imports"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "pipeline"}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def room_of(name: str) -> str | None:
    """Return the room of a module; None if it belongs to a library."""
    package, _, rest = name.partition(".")
    if package == "cache":
        return "cache"
    return (rest.partition(".")[0] or "__init__") if package == "pipeline" else None


def level_of(room: str) -> int:
    return next(level for level, rooms in enumerate(LEVELS) if room in rooms)


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_room_imports_only_from_lower_rooms(module: Path) -> None:
    own = room_of(name_of(module))
    assert own is not None
    for room in {room_of(name) for name in imports_of(module)} - {None, own, "configs"}:
        assert level_of(str(room)) < level_of(own), f"{own} imports {room}"


def test_no_import_cycles() -> None:
    names = {name_of(module) for module in MODULES}
    imports = {name_of(module): imports_of(module) & names - {"pipeline"} for module in MODULES}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        for other in imports.pop(name, ()):
            visit(other, (*path, name))

    while imports:
        visit(next(iter(imports)), ())


@pytest.mark.parametrize("module", sorted((ROOT / "cache").glob("*.py")), ids=lambda path: path.stem)
def test_cache_imports_no_model_library(module: Path) -> None:
    outside = {name.split(".")[0] for name in imports_of(module)} & {"torch", "transformers", "peft", "pipeline"}
    assert not outside
    if module.stem != "hdf5":
        assert "h5py" not in imports_of(module)


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_module_is_short(module: Path) -> None:
    assert len(module.read_text().splitlines()) <= MAX_LINES


def test_package_has_few_top_level_modules() -> None:
    assert len(list((ROOT / "pipeline").glob("*.py"))) <= MAX_TOP_LEVEL_MODULES
    assert len(MODULES) > 60


@pytest.mark.parametrize("name", ["cli", "cli_cache", "cli_runner"])
def test_command_line_imports_no_stage_at_the_top(name: str) -> None:
    body = ast.parse((ROOT / "pipeline" / f"{name}.py").read_text()).body
    modules = {node.module for node in body if isinstance(node, ast.ImportFrom)}
    ours = {module for module in modules if module and module.startswith(("pipeline", "cache"))}
    light = {f"pipeline.common.{module}" for module in ("distributed", "errors", "libraries", "result", "terminal")}
    assert ours <= light | {"pipeline.cli_cache", "pipeline.cli_runner"}
