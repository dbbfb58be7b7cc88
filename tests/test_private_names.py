"""Private names of libraries are used in `pipeline.common.compat` only.

Decidable from the source: imports of private modules or names of other packages, and attributes with a leading
underscore that no own module defines.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPAT = ROOT / "pipeline" / "common" / "compat.py"
MODULES = sorted(path for folder in ("pipeline", "cache") for path in (ROOT / folder).rglob("*.py") if path != COMPAT)
OWN_PACKAGES = {"pipeline", "cache", "configs"}
PUBLIC = {"_asdict", "_replace", "_fields", "_make", "_exit"}
"""Documented names of named tuples, and `os._exit`."""
LIBRARY_HOOKS = {"_keep_in_fp32_modules", "_keys_to_ignore_on_load_unexpected", "_no_split_modules"}
"""Private class attributes that transformers reads from models."""


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def private_imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in OWN_PACKAGES:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in names if is_private(name) and node.module != "__future__")


def defined_names(tree: ast.AST) -> set[str]:
    """Names that a module defines itself: functions, attributes of `self`, and class attributes."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_self(node):
            names.add(node.attr)
        elif isinstance(node, ast.ClassDef):
            assigned = [target for one in node.body if isinstance(one, ast.Assign) for target in one.targets]
            assigned += [one.target for one in node.body if isinstance(one, ast.AnnAssign)]
            names |= {target.id for target in assigned if isinstance(target, ast.Name)}
    return names


def of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def private_attributes(tree: ast.AST, own: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in PUBLIC | own:
            yield f"line {node.lineno}: {ast.unparse(node)}"


def hooks(tree: ast.AST) -> Iterator[str]:
    yield from (
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in LIBRARY_HOOKS
    )


def private_names(source: str, own_elsewhere: frozenset[str] = frozenset()) -> list[str]:
    tree = ast.parse(source)
    own = defined_names(tree) | own_elsewhere
    return [*private_imports(tree), *private_attributes(tree, own), *hooks(tree)]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_name_of_a_library_is_used(module: Path) -> None:
    inherited = frozenset(base_class_names(module))
    assert private_names(module.read_text(encoding="utf-8"), inherited) == []


def base_class_names(module: Path) -> Iterator[str]:
    """Names defined in own modules that this one imports: a subclass may use those of its base class."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OWN_PACKAGES:
            path = (ROOT / str(node.module).replace(".", "/")).with_suffix(".py")
            if path.is_file():
                yield from defined_names(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "source",
    [
        "from torch._subclasses.fake_tensor import FakeTensorMode",
        "from torch import _dynamo",
        "import torch._inductor",
        "tensor.untyped_storage()._cdata",
        "arguments._n_gpu = 1",
        "Model._from_config(config)",
        "atexit._run_exitfuncs()",
        "class Mine(Model):\n    _keep_in_fp32_modules = ()",
        "class Mine(Trainer):\n    def step(self):\n        return self._wrap_model(None)",
    ],
)
def test_private_names_are_found(source: str) -> None:
    assert private_names(source)


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos._exit(0)",
        "pair._replace(first=1)._asdict()",
        "class Mine:\n    def set(self):\n        self._own = 1\n    def get(self, one):\n        return one._own",
        "from pipeline.blip2 import _private\nfrom __future__ import annotations",
        "module.__name__",
    ],
)
def test_own_and_documented_names_are_allowed(source: str) -> None:
    assert not private_names(source)
