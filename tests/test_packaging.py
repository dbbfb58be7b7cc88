"""Packaging: constraints.txt is complete and within the ranges of pyproject.toml, and all packages are installed."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [
    Requirement(line) for line in [*PROJECT["dependencies"], *(one for lines in EXTRAS.values() for one in lines)]
]


def test_every_package_is_installed() -> None:
    packages = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in ROOT.glob("pipeline/**/__init__.py")}
    assert set(SETUPTOOLS["packages"]) == packages | {"cache", "pipeline.configs"}


def test_type_checkers_find_the_annotations() -> None:
    for package in ("pipeline", "cache"):
        assert (ROOT / package / "py.typed").is_file()
        assert "py.typed" in SETUPTOOLS["package-data"][package]


def pinned() -> dict[str, set[Version]]:
    """Return the pinned versions by name; several if they differ by Python version or system."""
    found: dict[str, set[Version]] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.lstrip().startswith("#"):
            (only,) = (pin := Requirement(line)).specifier
            assert only.operator == "==", line
            found.setdefault(canonicalize_name(pin.name), set()).add(Version(only.version))
    return found


@pytest.mark.parametrize("requirement", DIRECT, ids=str)
def test_pinned_version_is_within_its_range(requirement: Requirement) -> None:
    versions = pinned()[canonicalize_name(requirement.name)]
    assert versions
    assert all(requirement.specifier.contains(version) for version in versions)


def add_dependencies(requirement: Requirement, seen: set[str]) -> None:
    """Add to `seen` what installing `requirement` installs here, including itself."""
    name = canonicalize_name(requirement.name)
    try:
        dependencies = [Requirement(line) for line in requires(name) or []]
    except PackageNotFoundError:
        return  # an extra that is not installed
    seen.add(name)
    for one in dependencies:
        is_installed = any(
            one.marker is None or one.marker.evaluate({"extra": extra}) for extra in ["", *requirement.extras]
        )
        if is_installed and canonicalize_name(one.name) not in seen:
            add_dependencies(one, seen)


def test_all_dependencies_are_pinned() -> None:
    seen: set[str] = set()
    for requirement in DIRECT:
        add_dependencies(requirement, seen)
    assert len(seen) > len(PROJECT["dependencies"])
    assert seen <= pinned().keys(), "run the command in the first lines of constraints.txt to update it"


def test_readme_installs_with_the_constraints() -> None:
    commands = re.findall(r"pip install [^&|\n]*", (ROOT / "README.md").read_text(encoding="utf-8"))
    whole = [command for command in commands if re.search(r" '?\.(\[\w+\])?'?( |$|`)", command)]
    assert len(whole) >= 2
    for command in whole:
        assert "-c constraints.txt" in command, command
