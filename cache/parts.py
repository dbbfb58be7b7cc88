"""The parts in a folder: which there are, in which order their rows are numbered, and whether they are sound."""

from collections.abc import Container, Iterator, Mapping
from itertools import count
from pathlib import Path
from types import MappingProxyType

import numpy as np

from cache.files import sha256_of
from cache.format import PART_NAME, PartLayout, head_sha256, inspect_part, part_name, sealed_name
from cache.manifest import MANIFEST_NAME, Manifest, PartEntry, Plan, PlannedPart
from cache.spec import CacheError, CacheSpec, DamagedFileError


def part_layouts(
    folder: Path, spec: CacheSpec, known: Mapping[Path, PartLayout] = MappingProxyType({})
) -> list[PartLayout]:
    """Return the checked parts of a folder in the order of their rows: the manifest's, then by name.

    Args:
        folder: The cache.
        spec: The spec that all parts must have.
        known: Sealed parts that need no second check, by path.

    Raises:
        CacheError: A part is damaged or has another spec.
    """
    listed = listed_parts(folder, spec)
    plan = Plan.load(folder).parts
    paths = {sealed_name(path): path for path in folder.iterdir() if PART_NAME.fullmatch(path.name)}
    names = [*listed, *sorted(name for name in paths if name not in listed)]
    # A listed part without a file was deleted by hand: its images are encoded again.
    return [
        known.get(paths[name]) or _check_part(paths[name], folder, spec, listed, plan)
        for name in names
        if name in paths
    ]


def _check_part(
    path: Path, folder: Path, spec: CacheSpec, listed: Mapping[str, PartEntry], plan: Mapping[str, PlannedPart]
) -> PartLayout:
    name = sealed_name(path)
    if name in listed:
        listed[name].check(folder, spec.row_bytes)
    elif name in plan:
        plan[name].check(path)
    elif listed or plan:
        return inspect_unlisted(path, spec)
    layout = inspect_part(path)
    _check_spec(spec, layout.spec, path)
    return layout


def inspect_unlisted(path: Path, spec: CacheSpec) -> PartLayout:
    """Return the layout of a part that neither the manifest nor the plan lists.

    Raises:
        DamagedFileError: It cannot be a part of a cache of this spec.
    """
    try:
        layout = inspect_part(path)
        if layout.spec != spec:
            raise DamagedFileError(path, "it has features of another spec", "")
        return layout
    except DamagedFileError as error:
        advice = "Delete this one file and run the same command again."
        raise DamagedFileError(path, f"is not a part of this cache: {error.problem}", advice) from error


def listed_parts(folder: Path, spec: CacheSpec) -> dict[str, PartEntry]:
    """Return the manifest's parts by name, in its order; none if there is no manifest.

    Raises:
        CacheError: The manifest is damaged or has another spec.
    """
    if not (folder / MANIFEST_NAME).exists():
        return {}
    manifest = Manifest.load(folder)
    _check_spec(spec, manifest.spec, folder / MANIFEST_NAME)
    return {part.file: part for part in manifest.parts}


def stored_rows(part: PartLayout) -> Iterator[tuple[bytes, int]]:
    """Return digest and row of every stored row of a part."""
    return ((part.digests[row].tobytes(), row) for row in np.flatnonzero(part.crc32 >= 0).tolist())


def is_partial(part: PartLayout) -> bool:
    """Return whether a part is not sealed."""
    return part.path.suffix == ".partial"


def unused_part_names(folder: Path, listed: Container[str]) -> Iterator[str]:
    """Yield part names, lowest first, that neither a file nor the manifest has.

    The name of a part that was deleted by hand is not reused: in the old manifest it refers to another file.
    """
    used = {sealed_name(path) for path in folder.iterdir()}
    names = (part_name(index) for index in count())
    return (name for name in names if name not in used and name not in listed)


def part_entry(part: PartLayout) -> PartEntry:
    """Return the manifest's entry of a sealed part. Raises OSError."""
    return PartEntry(part.path.name, part.rows, part.features_offset, sha256_of(part.path, part.features_offset))


def planned_part(name: str, part: PartLayout) -> PlannedPart:
    """Return the plan's entry of a part whose sealed file will have `name`. Raises OSError."""
    place = (part.features_offset, part.crc_offset, part.rows)
    return PlannedPart(name, *place, head_sha256(part.path, *place))


def _check_spec(wanted: CacheSpec, found: CacheSpec, path: Path) -> None:
    if found != wanted:
        lines = "\n".join(f"  {line}" for line in found.diff(wanted))
        raise CacheError(
            f"{path}: the features in this cache have another spec:\n{lines}\n"
            f"Choose another `cache.dir`, or delete this cache with `pipe cache rm {path.parent}`."
        )
