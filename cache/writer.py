"""The writer of a cache: which images go into which part, and the manifest at the end."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from cache.estimate import PART_ROWS, distinct_digests
from cache.files import TEMPORARY, fsync_folder, rename, temporary_path, write_atomically
from cache.format import DIGEST_BYTES, NOT_WRITTEN, PartLayout, create_part, inspect_part, sealed_name
from cache.lock import LOCK_NAME, FolderLock
from cache.manifest import ATTACHMENT_TEMPORARY, MANIFEST_NAME, Manifest, Plan, TextEntry, attachment_file
from cache.ownership import check_usable, listed_files, own_files
from cache.part import PartWriter
from cache.parts import is_partial, listed_parts, part_entry, part_layouts, planned_part, stored_rows, unused_part_names
from cache.reader import FeatureReader
from cache.reuse import Origins, copy_rows, find_rows
from cache.spec import CacheError, CacheSpec
from cache.text import TextTable
from cache.thumbnails import thumbnails_name

T = TypeVar("T")


class FeatureWriter:
    """Writer of the cache in `folder`, which assigns every wanted image to a part.

    Images that the cache stores already are kept. Rows of other caches are copied. For the remaining images it creates
    the unfinished parts `parts`, each to be filled by a `PartWriter` in this process or another. Then call `rows` and
    `finish`. After a kill the same call finds the same parts, with the rows written so far. Only one process at a time
    can write a folder.

    Args:
        folder: The cache, created if needed.
        spec: The spec of the features.
        digests: SHA-256 digests (32 bytes each) of the wanted image files.
        part_rows: Number of rows per full part.
        sources: Finished caches whose rows are copied if their spec is equal.
        io: How `sources` are read, see `FeatureReader`.

    Raises:
        CacheError: The folder contains other files only, another process is writing it, a part is damaged or has
            another spec, or a write fails.
    """

    def __init__(
        self,
        folder: Path,
        spec: CacheSpec,
        digests: Sequence[bytes],
        part_rows: int = PART_ROWS,
        sources: Sequence[Path] = (),
        io: str = "memmap",
    ) -> None:
        """Lock the folder, create the parts and copy rows."""
        if part_rows < 1:
            raise CacheError(f"a part must have at least 1 row, not {part_rows}")
        self.folder, self.spec, self.part_rows = Path(folder), spec, part_rows
        self._wanted = distinct_digests(digests)
        self._sealed: dict[Path, PartLayout] = {}  # never change, and take time to check
        self._lock: FolderLock | None = None
        try:
            with _disk_errors(self.folder):
                self._open_folder()
                missing = self._missing()
                self.reused = len(self._wanted) - len(missing)
                """Number of wanted images that were stored already."""
                origins = find_rows(sources, spec, missing)
                self._create_parts(missing, origins)
                self.copied = self._copy(origins, io)
                """Number of rows copied from other caches."""
                self.parts: list[Path] = [part.path for part in self._unfinished()]
                """The unfinished parts, each with unwritten rows."""
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "FeatureWriter":
        """Return this writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close this writer."""
        self.close()

    def close(self) -> None:
        """Release the folder; completed work stays."""
        if self._lock:
            self._lock.release()
            self._lock = None

    def rows(self) -> dict[bytes, int]:
        """Return the row of every wanted image in a sealed part, by digest."""
        found: dict[bytes, int] = {}
        start = 0
        for part in self._layouts():
            if is_partial(part) or not (part.crc32 >= 0).any():
                continue  # not listed in the manifest
            for digest, row in stored_rows(part):
                if digest in self._wanted:
                    found.setdefault(digest, start + row)
            start += part.rows
        return found

    def images(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the image digests (rows, 32) of every part, by the name of the sealed file."""
        return {sealed_name(part.path): part.digests for part in self._layouts()}

    def finish(
        self,
        texts: Mapping[str, TextTable],
        attachments: Mapping[str, bytes] | None = None,
        provenance: Mapping[str, Any] | None = None,
        thumbnails: Mapping[str, str] | None = None,
    ) -> None:
        """Write texts and attachments, then the manifest, which finishes the cache atomically.

        Args:
            texts: The questions of each split; `image_row` has the rows that `rows` returned.
            attachments: Content of further files by name.
            provenance: Origin of the contents, stored as JSON.
            thumbnails: SHA-256 of the thumbnails that were saved, by part.

        Raises:
            CacheError: A part is unfinished, a text refers to a row that is not stored, the name of a split or an
                attachment is not allowed, or a write fails.
        """
        with _disk_errors(self.folder):
            layouts = self._finished_layouts()
            stored = np.concatenate([np.empty(0, bool), *(part.crc32 >= 0 for part in layouts)])
            for split, table in texts.items():
                if len(table) and not (table.image_row.max() < len(stored) and stored[table.image_row].all()):
                    raise CacheError(f"text of split {split}: image_row refers to rows that {self.folder} lacks")
            names = [part.path.name for part in layouts]
            saved = {thumbnails_name(name): (thumbnails or {}).get(name) for name in names}
            hashed = {name: self._save_attachment(name, data) for name, data in (attachments or {}).items()}
            manifest = Manifest(
                spec=self.spec,
                part_rows=self.part_rows,
                parts=[part_entry(part) for part in layouts],
                rows=int(stored.sum()),
                splits={split: self._save_text(split, table) for split, table in texts.items()},
                attachments=hashed | {name: sha256 for name, sha256 in saved.items() if sha256},
                provenance=dict(provenance or {}),
            )
            self._replace_manifest(manifest)

    def _open_folder(self) -> None:
        check_usable(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        fsync_folder(self.folder.parent)
        self._lock = FolderLock(self.folder)
        for path in own_files(self.folder):
            if path.name.endswith(TEMPORARY):
                path.unlink()
        self._remove_duplicate_parts()

    def _remove_duplicate_parts(self) -> None:
        """Remove what a killed repair left: unplanned parts with exactly the images of a listed part."""
        listed, plan = listed_parts(self.folder, self.spec), Plan.load(self.folder).parts
        layouts = self._layouts() if listed else []
        images = {part.digests.tobytes() for part in layouts if part.path.name in listed}
        for part in layouts:
            unknown = part.path.name not in listed and sealed_name(part.path) not in plan
            if unknown and part.digests.tobytes() in images:
                part.path.unlink()

    def _missing(self) -> dict[bytes, None]:
        """Return the wanted images that no part stores, in order."""
        stored = {digest for part in self._layouts() for digest, _ in stored_rows(part) if digest in self._wanted}
        return {digest: None for digest in self._wanted if digest not in stored}

    def _create_parts(self, missing: dict[bytes, None], origins: Origins) -> None:
        """Create parts for the missing images that no unfinished part has, separately for images to copy."""
        unplanned = self._seal_unwanted(missing)
        to_copy = [digest for digest in unplanned if digest in origins]
        to_encode = [digest for digest in unplanned if digest not in origins]
        names = unused_part_names(self.folder, listed_parts(self.folder, self.spec))
        new: list[Path] = []
        for chunk in [*_chunks(to_copy, self.part_rows), *_chunks(to_encode, self.part_rows)]:
            digests = np.frombuffer(b"".join(chunk), np.uint8).reshape(-1, DIGEST_BYTES)
            new.append(self.folder / f"{next(names)}.partial")
            create_part(temporary_path(new[-1]), self.spec, digests)
        self._save_plan(new)
        for path in new:
            rename(temporary_path(path), path)

    def _seal_unwanted(self, missing: dict[bytes, None]) -> dict[bytes, None]:
        """Seal unfinished parts unless all their unwritten images are missing; return the images left to plan."""
        unplanned = dict(missing)
        for part in self._unfinished():
            planned = {part.digests[row].tobytes() for row in np.flatnonzero(part.crc32 == NOT_WRITTEN)}
            if planned and all(digest in unplanned for digest in planned):
                for digest in planned:
                    del unplanned[digest]
            else:
                PartWriter(part.path).seal()
        return unplanned

    def _save_plan(self, new: Sequence[Path]) -> None:
        """Save the plan of all unlisted parts, before the `new` ones get their names.

        So no later run lets HDF5 open a damaged one.
        """
        listed = listed_parts(self.folder, self.spec)
        parts = {sealed_name(part.path): part for part in self._layouts()}
        parts |= {sealed_name(path): inspect_part(temporary_path(path)) for path in new}
        plan = Plan({name: planned_part(name, part) for name, part in parts.items() if name not in listed})
        if plan != Plan.load(self.folder):
            plan.save(self.folder)

    def _copy(self, origins: Origins, io: str) -> int:
        """Fill the unfinished parts from other caches; return the number of rows."""
        copied = 0
        open_reader = cache(lambda folder: FeatureReader(folder, io))
        for layout in self._unfinished():
            with PartWriter(layout.path) as part:
                copied += copy_rows(part, origins, open_reader)
                if not part.unwritten_rows.size:
                    part.seal()
        return copied

    def _layouts(self) -> list[PartLayout]:
        layouts = part_layouts(self.folder, self.spec, self._sealed)
        self._sealed = {part.path: part for part in layouts if not is_partial(part)}
        return layouts

    def _unfinished(self) -> list[PartLayout]:
        return [part for part in self._layouts() if is_partial(part)]

    def _finished_layouts(self) -> list[PartLayout]:
        """Return the parts that have a row. Raises CacheError if one is unfinished."""
        layouts = self._layouts()
        if any(map(is_partial, layouts)):
            raise CacheError(f"{self.folder}: a part is unfinished. Run `pipe precompute` again to resume.")
        return [part for part in layouts if (part.crc32 >= 0).any()]

    def _save_attachment(self, name: str, data: bytes) -> str:
        """Write an attachment; return its SHA-256."""
        sha256 = hashlib.sha256(data).hexdigest()
        write_atomically(self.folder / attachment_file(name, sha256), data, self.folder / ATTACHMENT_TEMPORARY)
        return sha256

    def _save_text(self, split: str, table: TextTable) -> TextEntry:
        """Write the text of a split, unless the finished cache has the same."""
        with suppress(CacheError):  # no finished cache, no such split, or a damaged one
            reader = FeatureReader(self.folder)
            if reader.text(split).equals(table):
                return reader.manifest.splits[split]
        return table.save(self.folder, split)

    def _replace_manifest(self, manifest: Manifest) -> None:
        """Save the manifest, and remove the files that only the old one needed."""
        old = own_files(self.folder)
        manifest.save(self.folder)
        for path in old:
            if path.name not in {*listed_files(manifest), MANIFEST_NAME, LOCK_NAME}:
                path.unlink()


def _chunks(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (values[start : start + size] for start in range(0, len(values), size))


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Convert OSError to a CacheError that names the folder and the next step."""
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"{folder}: {error}. Completed work is saved. Fix the cause and run the same command again."
        ) from error
