"""Is everything in a cache what was written? And how a damaged row is taken out of it."""

import errno
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cache.files import as_bytes, opened, pread_into, pwrite_all, rename, temporary
from cache.format import DIGEST_BYTES, FAILED, PART_NAME, PartLayout, check_head, inspect_part, lay_out_part, unreadable
from cache.lock import FolderLock
from cache.manifest import MANIFEST_NAME, Manifest, PartEntry, TextEntry, attachment_file
from cache.spec import CacheError, CacheSpec, UnreadableError
from cache.text import TextTable
from cache.writer import free_names, part_entry

_BLOCK_BYTES = 8 << 20

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Damage:
    """Something in a cache that is not what was written."""

    file: str
    problem: str
    row: int | None = None
    """Row of the part; None: the file as a whole cannot be trusted."""
    unreadable: bool = False
    """Whether it could not be read, as for want of permission: nothing is known of what is in it."""


@dataclass(frozen=True)
class Verification:
    """What `verify` found, and how much it read."""

    damages: list[Damage]
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
    try:
        manifest = Manifest.load(folder)
    except OSError as error:
        raise CacheError(f"{folder}: {error}") from error
    damages = [damage for name, check in _other_files(folder, manifest) for damage in _damage_of_file(name, check)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(lambda part: _verify_part(folder, part, manifest.spec, on_bytes), manifest.parts):
            damages += found
    names = [*(part.file for part in manifest.parts), *(name for name, _ in _other_files(folder, manifest))]
    there = [folder / name for name in names if (folder / name).exists()]
    return Verification(damages, 1 + len(names), manifest.rows, sum(path.stat().st_size for path in there))


def drop_damaged(folder: Path, damages: Iterable[Damage]) -> int:
    """Takes damaged rows out of the cache, so that `pipe precompute` sees what is missing; -> how many rows.

    A part is replaced by a new file in which those rows are given up, all of them if the file as a whole cannot be
    trusted. The others keep their numbers. A kill at any moment leaves the old or the new cache. Raises CacheError.
    """
    by_part: dict[str, set[int | None]] = {}
    for damage in damages:
        if PART_NAME.fullmatch(damage.file) and not damage.unreadable:
            by_part.setdefault(damage.file, set()).add(damage.row)
    if not by_part:
        return 0
    try:
        lock = FolderLock(folder)
        try:
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
    building = temporary(path)
    digests = np.zeros((part.rows, DIGEST_BYTES), np.uint8) if old is None else old.digests
    lay_out_part(building, spec, digests)
    new = inspect_part(building)
    with opened(building, os.O_RDWR) as target:
        if old is not None:
            with opened(old.path, os.O_RDONLY) as source:
                for row in np.flatnonzero(keep).tolist():
                    data = memoryview(bytearray(spec.row_bytes))
                    pread_into(source, data, old.features_offset + row * spec.row_bytes)
                    pwrite_all(target, data, new.features_offset + row * spec.row_bytes)
        checksums = np.full(part.rows, FAILED, "<i8") if old is None else np.where(keep, old.crc32, FAILED)
        pwrite_all(target, as_bytes(checksums.astype("<i8")), new.crc_offset)
        os.fsync(target)
    rename(building, path)
    return part_entry(inspect_part(path))


def _verify_part(folder: Path, part: PartEntry, spec: CacheSpec, on_bytes: Callable[[int], object]) -> list[Damage]:
    try:
        part.check(folder, spec.row_bytes)
        layout = inspect_part(folder / part.file)
        if (layout.spec, layout.rows, layout.features_offset) != (spec, part.rows, part.head_bytes):
            raise CacheError(f"{layout.path}: is not the part that {MANIFEST_NAME} names")
        on_bytes(part.head_bytes)
        return [Damage(part.file, "is not what was written", row) for row in _bad_rows(layout, on_bytes)]
    except (CacheError, OSError) as error:
        problem = str(error).removeprefix(f"{folder / part.file}: ")
        return [Damage(part.file, problem, unreadable=isinstance(error, UnreadableError))]


def _bad_rows(layout: PartLayout, on_bytes: Callable[[int], object]) -> Iterator[int]:
    """Rows whose bytes do not fit their CRC, or that a defect of the disk lies under.

    Raises UnreadableError if none can be read, or for another reason.
    """
    size = layout.spec.row_bytes
    at_once = max(1, _BLOCK_BYTES // size)
    buffer = memoryview(bytearray(at_once * size))
    with opened(layout.path, os.O_RDONLY) as descriptor:
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
            raise unreadable(layout.path, error) from error
    lost = set()
    for place, row in enumerate(rows):
        try:
            pread_into(descriptor, buffer[place * size : (place + 1) * size], start + place * size)
        except OSError as error:
            lost.add(row)
            if len(lost) == len(rows):
                raise unreadable(layout.path, error) from error
    return lost


def _other_files(folder: Path, manifest: Manifest) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every file beside the parts, and what raises if it is not sound."""
    for text in manifest.splits.values():
        yield text.file, partial(_check_text, folder / text.file, text)
    for name, sha256 in manifest.attachments.items():
        file = attachment_file(name, sha256)
        yield file, partial(check_head, folder / file, None, sha256)


def _check_text(path: Path, text: TextEntry) -> None:
    check_head(path, None, text.sha256)
    if len(TextTable.load(path)) != text.questions:
        raise CacheError(f"{path}: does not hold {text.questions} questions")


def _damage_of_file(name: str, check: Callable[[], object]) -> Iterator[Damage]:
    try:
        check()
    except CacheError as error:
        yield Damage(name, str(error), unreadable=isinstance(error, UnreadableError))
