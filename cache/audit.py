"""Is everything in a cache what was written? And how a damaged row is taken out of it."""

import errno
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from cache.files import as_bytes, open_descriptor, pread_into, pwrite_all, rename, temporary_path
from cache.format import DIGEST_BYTES, FAILED, PART_NAME, PartLayout, check_head, create_part, inspect_part, read_error
from cache.lock import FolderLock, exclude_readers
from cache.manifest import MANIFEST_NAME, PLAN_NAME, Manifest, PartEntry, TextEntry, attachment_file, unlisted_parts
from cache.spec import CacheError, CacheSpec, FileError, UnreadableError
from cache.text import TextTable
from cache.writer import free_names, inspect_unlisted, part_entry

_BLOCK_BYTES = 8 << 20
NOT_STORED = "is not stored, and there are questions on its picture"
NOT_A_PART = "is no part of this cache: delete it"

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Damage:
    """Something in a cache that is not what was written, or not there."""

    file: str
    """Name in the cache's folder."""
    problem: str
    row: int | None = None
    """Row of the part; None: the file as a whole cannot be trusted."""
    unreadable: bool = False
    """Whether it could not be read, as for want of permission: nothing is known of what is in it."""


@dataclass(frozen=True)
class Verification:
    """What `verify` found, and how much it read."""

    damage: list[Damage]
    files: int
    rows: int
    bytes: int


def verify(folder: Path, on_bytes: Callable[[int], object] = lambda count: None) -> Verification:
    """Reads every byte of the finished cache in `folder` that means something, and compares it with its checksum.

    `on_bytes` is told of progress. Raises CacheError if there is no manifest or it is itself damaged: without it
    nothing else can be trusted.
    """
    if not (folder / MANIFEST_NAME).exists():
        raise CacheError(f"{folder}: has no {MANIFEST_NAME}: no cache, or an unfinished one: run `pipe precompute`")
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


def drop_damaged(folder: Path, damages: Iterable[Damage]) -> int:
    """Takes damaged rows out of the cache, so that `pipe precompute` sees what is missing; -> how many rows.

    A part is replaced by a new file in which those rows are given up, all of them if the file as a whole cannot be
    trusted. The others keep their numbers. A kill at any moment leaves the old or the new cache. Raises CacheError.
    """
    by_part: dict[str, set[int | None]] = {}
    for damage in damages:
        lost = not damage.unreadable and damage.problem not in (NOT_STORED, NOT_A_PART)
        if lost and PART_NAME.fullmatch(damage.file):
            by_part.setdefault(damage.file, set()).add(damage.row)
    if not by_part:
        return 0
    try:
        lock = FolderLock(folder)
        try:
            with exclude_readers(folder, "repair"):
                return _replace_parts(folder, by_part)
        finally:
            lock.release()
    except OSError as error:
        raise CacheError(f"{folder}: {error}. The cache is as it was; run the same command again.") from error


def _replace_parts(folder: Path, by_part: Mapping[str, set[int | None]]) -> int:
    manifest = Manifest.load(folder)
    names = free_names(folder, [part.file for part in manifest.parts])
    parts = list(manifest.parts)
    for index, part in enumerate(manifest.parts):
        bad = by_part.get(part.file, set())
        if None in bad:  # of the file nothing is lost if it is replaced at once
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
    """Writes a part to `path` with only those rows of `old` that are to be kept; -> its entry."""
    building = temporary_path(path)
    digests = np.zeros((part.rows, DIGEST_BYTES), np.uint8) if old is None else old.digests
    create_part(building, spec, digests)
    new = inspect_part(building)
    with open_descriptor(building, os.O_RDWR) as target:
        if old is not None:
            with open_descriptor(old.path, os.O_RDONLY) as source:
                for row in np.flatnonzero(keep).tolist():
                    data = memoryview(bytearray(spec.row_bytes))
                    pread_into(source, data, old.features_offset + row * spec.row_bytes)
                    pwrite_all(target, data, new.features_offset + row * spec.row_bytes)
        checksums = np.full(part.rows, FAILED, "<i8") if old is None else np.where(keep, old.crc32, FAILED)
        pwrite_all(target, as_bytes(checksums.astype("<i8")), new.crc_offset)
        os.fsync(target)
    rename(building, path)
    return part_entry(inspect_part(path))


def _verify_part(
    folder: Path, part: PartEntry, spec: CacheSpec, on_bytes: Callable[[int], object]
) -> tuple[PartLayout | None, list[Damage]]:
    """The part, None if it cannot be trusted as a whole, and what is wrong with it."""
    try:
        part.check(folder, spec.row_bytes)
        layout = inspect_part(folder / part.file)
        if (layout.spec, layout.rows, layout.features_offset) != (spec, part.rows, part.head_bytes):
            raise CacheError(f"is not the part that {MANIFEST_NAME} names")
        on_bytes(part.head_bytes)
        return layout, [Damage(part.file, "is not what was written", row) for row in _bad_rows(layout, on_bytes)]
    except (CacheError, OSError) as error:
        return None, [_damage(folder / part.file, error)]


def _not_stored(layout: PartLayout, needed: Array) -> list[Damage]:
    """Of the rows `needed`, counted from the part's first, those in this part that hold nothing."""
    here = needed[(needed >= 0) & (needed < layout.rows)]
    return [Damage(layout.path.name, NOT_STORED, row) for row in here[layout.crc32[here] < 0].tolist()]


def _bad_rows(layout: PartLayout, on_bytes: Callable[[int], object]) -> Iterator[int]:
    """Rows whose bytes do not fit their CRC, or that a defect of the disk lies under.

    Raises UnreadableError if none can be read, or for another reason.
    """
    size = layout.spec.row_bytes
    at_once = max(1, _BLOCK_BYTES // size)
    buffer = memoryview(bytearray(at_once * size))
    with open_descriptor(layout.path, os.O_RDONLY) as descriptor:
        for start in range(0, layout.rows, at_once):
            rows = range(start, min(start + at_once, layout.rows))
            lost = _read_rows(descriptor, layout, rows, buffer)
            for place, row in enumerate(rows):
                wanted = int(layout.crc32[row])
                if wanted >= 0 and (row in lost or zlib.crc32(buffer[place * size : (place + 1) * size]) != wanted):
                    yield row
            on_bytes(len(rows) * size)


def _read_rows(descriptor: int, layout: PartLayout, rows: range, buffer: memoryview) -> set[int]:
    """Reads `rows`, one after the other in the file, to `buffer`; -> those that the disk has lost."""
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
    """Every file beside the parts."""
    attachments = (attachment_file(name, sha256) for name, sha256 in manifest.attachments.items())
    return [*(text.file for text in manifest.splits.values()), *attachments]


def _verify_other_files(folder: Path, manifest: Manifest) -> tuple[Array, list[Damage]]:
    """The rows that questions are about, each once, and what is wrong with the files beside the parts."""
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
        raise CacheError(f"does not hold {text.questions} questions")
    if len(table) and table.image_row.max() >= rows:
        raise CacheError(f"names row {table.image_row.max()}, and the cache has {rows}")
    return table.image_row


def _verify_unlisted(folder: Path, manifest: Manifest) -> list[Damage]:
    """What would bar the next writer; a sound part that is not listed yet, a killed repair leaves, is none of it."""
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
    """Of a file as a whole, by what was raised over it: without the file's name and the advice."""
    if isinstance(error, OSError):
        error = read_error(path, error)
    problem = error.problem if isinstance(error, FileError) else str(error)
    return Damage(path.name, problem, unreadable=isinstance(error, UnreadableError))
