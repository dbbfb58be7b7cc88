"""Repair of a cache: damaged rows are dropped, so that the next writer stores them again."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from cache.audit import NOT_A_PART, NOT_STORED, Damage
from cache.files import as_bytes, open_descriptor, pread_into, pwrite_all, rename, temporary_path
from cache.format import DIGEST_BYTES, FAILED, PART_NAME, PartLayout, create_part, inspect_part
from cache.hdf5 import Array
from cache.lock import FolderLock, exclude_readers
from cache.manifest import Manifest, PartEntry
from cache.parts import part_entry, unused_part_names
from cache.spec import CacheError, CacheSpec

_Damaged = Mapping[str, set[int | None]]
"""Damaged rows by file name; None stands for the whole file."""


def drop_damaged(folder: Path, damages: Iterable[Damage]) -> int:
    """Drop damaged rows, so that `pipe precompute` encodes their images again; return their number.

    Each damaged part is replaced by a new file with these rows marked as failed, or all rows if the file as a whole is
    damaged. The other rows keep their numbers. A kill leaves the old cache or the new one.

    Raises:
        CacheError: The cache is in use, or a write fails.
    """
    damaged: dict[str, set[int | None]] = {}
    for damage in damages:
        is_lost = not damage.unreadable and damage.problem not in (NOT_STORED, NOT_A_PART)
        if is_lost and PART_NAME.fullmatch(damage.file):
            damaged.setdefault(damage.file, set()).add(damage.row)
    if not damaged:
        return 0
    try:
        lock = FolderLock(folder)
        try:
            with exclude_readers(folder, "repair"):
                return _replace_parts(folder, damaged)
        finally:
            lock.release()
    except OSError as error:
        raise CacheError(f"{folder}: {error}. The cache is unchanged. Run the same command again.") from error


def _replace_parts(folder: Path, damaged: _Damaged) -> int:
    manifest = Manifest.load(folder)
    names = unused_part_names(folder, [part.file for part in manifest.parts])
    parts = list(manifest.parts)
    for index, part in enumerate(manifest.parts):
        bad = damaged.get(part.file, set())
        if None in bad:  # nothing of the file is worth keeping, so it is replaced at once
            parts[index] = _rebuild(folder / part.file, manifest.spec, part, None, np.zeros(part.rows, bool))
        elif bad:
            layout = inspect_part(folder / part.file)
            keep = layout.crc32 >= 0
            keep[[row for row in bad if row is not None]] = False
            parts[index] = _rebuild(folder / next(names), manifest.spec, part, layout, keep)
    rows = sum(int((inspect_part(folder / part.file).crc32 >= 0).sum()) for part in parts)
    replace(manifest, parts=parts, rows=rows).save(folder)
    for old, new in zip(manifest.parts, parts, strict=True):
        if old.file != new.file:
            (folder / old.file).unlink()
    return manifest.rows - rows


def _rebuild(path: Path, spec: CacheSpec, part: PartEntry, old: PartLayout | None, keep: Array) -> PartEntry:
    """Write a part to `path` with only the rows of `old` in `keep` (rows,) bool; return its entry."""
    temporary = temporary_path(path)
    digests = np.zeros((part.rows, DIGEST_BYTES), np.uint8) if old is None else old.digests
    create_part(temporary, spec, digests)
    new = inspect_part(temporary)
    with open_descriptor(temporary, os.O_RDWR) as target:
        if old is not None:
            _copy_rows(old, new, target, np.flatnonzero(keep))
        checksums = np.full(part.rows, FAILED, "<i8") if old is None else np.where(keep, old.crc32, FAILED)
        pwrite_all(target, as_bytes(checksums.astype("<i8")), new.crc_offset)
        os.fsync(target)
    rename(temporary, path)
    return part_entry(inspect_part(path))


def _copy_rows(old: PartLayout, new: PartLayout, target: int, rows: Array) -> None:
    row_bytes = old.spec.row_bytes
    data = memoryview(bytearray(row_bytes))
    with open_descriptor(old.path, os.O_RDONLY) as source:
        for row in rows.tolist():
            pread_into(source, data, old.features_offset + row * row_bytes)
            pwrite_all(target, data, new.features_offset + row * row_bytes)
