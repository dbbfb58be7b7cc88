"""What is installed: the versions of constraints.txt are complete, and within the ranges of pyproject.toml."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [
    Requirement(line) for line in [*PROJECT["dependencies"], *(one for lines in EXTRAS.values() for one in lines)]
]


def pinned() -> dict[str, set[Version]]:
    """Name -> its versions: one, or several where they differ by Python or system."""
    found: dict[str, set[Version]] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.lstrip().startswith("#"):
            (only,) = (pin := Requirement(line)).specifier
            assert only.operator == "==", line
            found.setdefault(canonicalize_name(pin.name), set()).add(Version(only.version))
    return found


@pytest.mark.parametrize("requirement", DIRECT, ids=str)
def test_a_pinned_version_is_within_its_range(requirement: Requirement) -> None:
    versions = pinned()[canonicalize_name(requirement.name)]
    assert versions
    assert all(requirement.specifier.contains(version) for version in versions)


def needed_by(requirement: Requirement, seen: set[str]) -> None:
    """Adds to `seen` what `requirement` brings here, itself included."""
    name = canonicalize_name(requirement.name)
    try:
        brought = [Requirement(line) for line in requires(name) or []]
    except PackageNotFoundError:
        return  # an extra that is not installed
    seen.add(name)
    for one in brought:
        is_here = any(
            one.marker is None or one.marker.evaluate({"extra": extra}) for extra in ["", *requirement.extras]
        )
        if is_here and canonicalize_name(one.name) not in seen:
            needed_by(one, seen)


def test_everything_that_is_installed_with_the_project_is_pinned() -> None:
    seen: set[str] = set()
    for requirement in DIRECT:
        needed_by(requirement, seen)
    assert len(seen) > len(PROJECT["dependencies"])
    assert seen <= pinned().keys(), "write constraints.txt anew, by the command in its first lines"


def test_the_readme_installs_with_the_constraints() -> None:
    commands = re.findall(r"pip install [^&|\n]*", (ROOT / "README.md").read_text(encoding="utf-8"))
    whole = [command for command in commands if re.search(r" '?\.(\[\w+\])?'?( |$|`)", command)]
    assert len(whole) >= 2
    for command in whole:
        assert "-c constraints.txt" in command, command
