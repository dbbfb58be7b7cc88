"""Imports run one way: cli -> commands -> training, answers -> batches, encoding -> data, blip2 -> common, cache."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = (
    {"cache"},
    {"common"},
    {"config", "overrides"},
    {"blip2"},
    {"data"},
    {"encoding"},
    {"batches", "runs"},
    {"answers"},
    {"training"},
    {"commands"},
    {"__init__"},
    {"cli"},
)
"""From the lowest: a room imports from itself and from lower ones. What stands in one line does not know the other."""
MAX_LINES = 350
MAX_TOP_LEVEL_MODULES = 8
ALL_MODULES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "cache").glob("*.py")])


def name_of(module: Path) -> str:
    return str(module.relative_to(ROOT).with_suffix("")).replace("/", ".")


def imports_of(module: Path) -> set[str]:
    """Every module that `module` imports from, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.name}: imports are absolute"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "pipeline"}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def room_of(name: str) -> str | None:
    """The room of a module by its full name; None if it is not ours."""
    package, _, rest = name.partition(".")
    if package == "cache":
        return "cache"
    return (rest.partition(".")[0] or "__init__") if package == "pipeline" else None


def level_of(room: str) -> int:
    return next(level for level, rooms in enumerate(ROOMS) if room in rooms)


@pytest.mark.parametrize("module", ALL_MODULES, ids=name_of)
def test_imports_run_one_way(module: Path) -> None:
    own = room_of(name_of(module).removesuffix(".__init__") if module.parent.name != "pipeline" else name_of(module))
    assert own is not None
    for room in {room_of(name) for name in imports_of(module)} - {None, own, "configs"}:
        assert level_of(str(room)) < level_of(own), f"{own} imports {room}"


def graph() -> dict[str, set[str]]:
    names = {name_of(module).removesuffix(".__init__") for module in ALL_MODULES}
    return {
        name_of(module).removesuffix(".__init__"): imports_of(module) & names - {"pipeline"} for module in ALL_MODULES
    }


def test_no_module_imports_itself_through_others() -> None:
    imports = graph()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        for other in imports.pop(name, ()):
            visit(other, (*path, name))

    while imports:
        visit(next(iter(imports)), ())


@pytest.mark.parametrize("module", sorted((ROOT / "cache").glob("*.py")), ids=lambda path: path.stem)
def test_the_cache_knows_nothing_of_the_models(module: Path) -> None:
    outside = {name.split(".")[0] for name in imports_of(module)} & {"torch", "transformers", "peft", "pipeline"}
    assert not outside
    if module.stem != "hdf5":
        assert "h5py" not in imports_of(module)


@pytest.mark.parametrize("module", ALL_MODULES, ids=name_of)
def test_modules_are_short(module: Path) -> None:
    assert len(module.read_text().splitlines()) <= MAX_LINES


def test_the_top_of_the_package_is_short() -> None:
    assert len(list((ROOT / "pipeline").glob("*.py"))) <= MAX_TOP_LEVEL_MODULES
    assert len(ALL_MODULES) > 60


def test_the_command_imports_no_stage_at_its_top() -> None:
    top = ast.parse((ROOT / "pipeline" / "cli.py").read_text()).body
    at_the_top = [node.module for node in top if isinstance(node, ast.ImportFrom)]
    slow = [name for name in at_the_top if name and name.startswith(("pipeline", "cache", "torch", "transformers"))]
    assert slow == ["pipeline.common.terminal"]
