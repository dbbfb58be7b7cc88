"""Verification of a cache: every file and row against its checksum."""

import errno
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from cache.files import open_descriptor, pread_into
from cache.format import PartLayout, check_head, inspect_part
from cache.hdf5 import read_error
from cache.manifest import MANIFEST_NAME, PLAN_NAME, Manifest, PartEntry, TextEntry, attachment_file, unlisted_parts
from cache.parts import inspect_unlisted
from cache.spec import CacheError, CacheSpec, FileError, UnreadableError
from cache.text import TextTable

_BLOCK_BYTES = 8 << 20
NOT_STORED = "is not stored, but questions refer to its image"
NOT_A_PART = "is not a part of this cache; delete it"

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Damage:
    """One damaged or missing file or row."""

    file: str
    """Name in the cache's folder."""
    problem: str
    row: int | None = None
    """Row of the part; None if the file as a whole is damaged."""
    unreadable: bool = False
    """Whether the file could not be read, e.g. without permission, so that its content may be intact."""


@dataclass(frozen=True)
class Verification:
    """Result of `verify`."""

    damage: list[Damage]
    files: int
    rows: int
    bytes: int


def verify(folder: Path, on_bytes: Callable[[int], object] = lambda count: None) -> Verification:
    """Compare every meaningful byte of the finished cache in `folder` with its checksum.

    Args:
        folder: The cache.
        on_bytes: Called with the number of bytes of each step.

    Raises:
        CacheError: The manifest is missing or damaged.
    """
    if not (folder / MANIFEST_NAME).exists():
        raise CacheError(f"{folder}: no finished cache, it has no {MANIFEST_NAME}. Run `pipe precompute`.")
    manifest = Manifest.load(folder)
    needed, damages = _verify_other_files(folder, manifest)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checked = pool.map(lambda part: _verify_part(folder, part, manifest.spec, on_bytes), manifest.parts)
        starts = accumulate((part.rows for part in manifest.parts), initial=0)
        for start, (layout, found) in zip(starts, checked, strict=False):  # the last start is the end
            damages += found + (_not_stored(layout, needed - start) if layout else [])
    damages += _verify_unlisted(folder, manifest)
    names = [*(part.file for part in manifest.parts), *_other_files(manifest)]
    there = [folder / name for name in names if (folder / name).exists()]
    return Verification(damages, 1 + len(names), manifest.rows, sum(path.stat().st_size for path in there))


def _verify_part(
    folder: Path, part: PartEntry, spec: CacheSpec, on_bytes: Callable[[int], object]
) -> tuple[PartLayout | None, list[Damage]]:
    """Return the part, None if it is damaged as a whole, and its damage."""
    try:
        part.check(folder, spec.row_bytes)
        layout = inspect_part(folder / part.file)
        if (layout.spec, layout.rows, layout.features_offset) != (spec, part.rows, part.head_bytes):
            raise CacheError(f"is not the part that {MANIFEST_NAME} lists")
        on_bytes(part.head_bytes)
        return layout, [Damage(part.file, "is damaged (CRC-32 mismatch)", row) for row in _bad_rows(layout, on_bytes)]
    except (CacheError, OSError) as error:
        return None, [_damage(folder / part.file, error)]


def _not_stored(layout: PartLayout, needed: Array) -> list[Damage]:
    """Return the rows of `needed`, counted from the part's first, that this part does not store."""
    here = needed[(needed >= 0) & (needed < layout.rows)]
    return [Damage(layout.path.name, NOT_STORED, row) for row in here[layout.crc32[here] < 0].tolist()]


def _bad_rows(layout: PartLayout, on_bytes: Callable[[int], object]) -> Iterator[int]:
    """Yield the rows that do not match their CRC or lie on a bad disk block.

    Raises UnreadableError if no row can be read, or a read fails for another reason.
    """
    size = layout.spec.row_bytes
    block_rows = max(1, _BLOCK_BYTES // size)
    buffer = memoryview(bytearray(block_rows * size))
    with open_descriptor(layout.path, os.O_RDONLY) as descriptor:
        for start in range(0, layout.rows, block_rows):
            rows = range(start, min(start + block_rows, layout.rows))
            lost = _read_rows(descriptor, layout, rows, buffer)
            for place, row in enumerate(rows):
                wanted = int(layout.crc32[row])
                if wanted >= 0 and (row in lost or zlib.crc32(buffer[place * size : (place + 1) * size]) != wanted):
                    yield row
            on_bytes(len(rows) * size)


def _read_rows(descriptor: int, layout: PartLayout, rows: range, buffer: memoryview) -> set[int]:
    """Read consecutive `rows` into `buffer`; return those on bad disk blocks."""
    size, start = layout.spec.row_bytes, layout.features_offset + rows.start * layout.spec.row_bytes
    try:
        pread_into(descriptor, buffer[: len(rows) * size], start)
        return set()
    except OSError as error:
        if error.errno != errno.EIO:
            raise read_error(layout.path, error) from error
    lost = set()
    for place, row in enumerate(rows):
        try:
            pread_into(descriptor, buffer[place * size : (place + 1) * size], start + place * size)
        except OSError as error:
            lost.add(row)
            if error.errno != errno.EIO or len(lost) == len(rows):
                raise read_error(layout.path, error) from error
    return lost


def _other_files(manifest: Manifest) -> list[str]:
    """Return the names of texts and attachments."""
    attachments = (attachment_file(name, sha256) for name, sha256 in manifest.attachments.items())
    return [*(text.file for text in manifest.splits.values()), *attachments]


def _verify_other_files(folder: Path, manifest: Manifest) -> tuple[Array, list[Damage]]:
    """Return the distinct rows that questions refer to, and the damage of texts and attachments."""
    needed, damages = [np.empty(0, np.int64)], []
    rows = sum(part.rows for part in manifest.parts)
    for text in manifest.splits.values():
        try:
            needed.append(_rows_of_text(folder / text.file, text, rows))
        except CacheError as error:
            damages.append(_damage(folder / text.file, error))
    for name, sha256 in manifest.attachments.items():
        path = folder / attachment_file(name, sha256)
        try:
            check_head(path, None, sha256)
        except CacheError as error:
            damages.append(_damage(path, error))
    return np.unique(np.concatenate(needed)), damages


def _rows_of_text(path: Path, text: TextEntry, rows: int) -> Array:
    check_head(path, None, text.sha256)
    table = TextTable.load(path)
    if len(table) != text.questions:
        raise CacheError(f"does not have {text.questions} questions")
    if len(table) and table.image_row.max() >= rows:
        raise CacheError(f"refers to row {table.image_row.max()}, the cache has {rows} rows")
    return table.image_row


def _verify_unlisted(folder: Path, manifest: Manifest) -> list[Damage]:
    """Return the unlisted files that would stop the next writer; a sound part, left by a killed repair, would not."""
    try:
        unlisted = unlisted_parts(folder, manifest)
    except CacheError as error:
        return [_damage(folder / PLAN_NAME, error)]
    damages = []
    for path in unlisted:
        try:
            inspect_unlisted(path, manifest.spec)
        except UnreadableError as error:
            damages.append(_damage(path, error))
        except CacheError:
            damages.append(Damage(path.name, NOT_A_PART))
    return damages


def _damage(path: Path, error: CacheError | OSError) -> Damage:
    """Return the damage of a whole file for an error, without the error's path and advice."""
    if isinstance(error, OSError):
        error = read_error(path, error)
    problem = error.problem if isinstance(error, FileError) else str(error)
    return Damage(path.name, problem, unreadable=isinstance(error, UnreadableError))
