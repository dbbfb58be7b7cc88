"""Writing a cache: which images go into which part, and the manifest at the end. The rows are `PartWriter`'s."""

import hashlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from errno import EMFILE, ENFILE, ENOMEM
from functools import cache
from itertools import count
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, TypeVar

import numpy as np

from cache.files import TEMPORARY, fsync_folder, rename, sha256_of, temporary_path, write_atomically
from cache.format import (
    DIGEST_BYTES,
    NOT_WRITTEN,
    PART_NAME,
    PartLayout,
    create_part,
    head_sha256,
    inspect_part,
    part_name,
)
from cache.lock import LOCK_NAME, FolderLock
from cache.manifest import (
    ATTACHMENT_TEMPORARY,
    MANIFEST_NAME,
    Manifest,
    PartEntry,
    Plan,
    PlannedPart,
    TextEntry,
    attachment_file,
)
from cache.ownership import holds_cache, listed_files, own_files
from cache.part import PartWriter
from cache.reader import FeatureReader
from cache.spec import CacheError, CacheSpec, DamagedFileError
from cache.text import TextTable
from cache.thumbnails import thumbnails_name

PART_ROWS = 1024
"""Rows of a full part by default: 48 MiB of BLIP-2's features in float16."""
_DIGEST_AND_CRC = 40  # bytes of a row in the head
_HEAD_BYTES = 36 << 10  # of a part beside them, at most: HDF5's metadata, and what aligns to pages

T = TypeVar("T")


class FeatureWriter:
    """Brings the cache in `folder` to hold the wanted images: the one process that decides which part takes what.

    `digests` are the SHA-256 digests (32 bytes each) of the wanted image files; those stored already are kept.
    Rows that finished caches of equal spec in `sources` have are copied, read as `FeatureReader` does with `io`.
    For the others parts are begun, `parts`, to be filled by a `PartWriter` each, in this process or others; then
    `rows` and `finish`. After a kill the same call finds the same parts, with what was written in them. Only one
    process at a time holds a folder.

    Raises CacheError if the folder holds other things only, is held by another writer, or has a part that is of
    another spec or not sound, or if the disk does not take what is written.
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
        if part_rows < 1:
            raise CacheError(f"a part must have at least 1 row, not {part_rows}")
        self.folder, self.spec, self.part_rows = Path(folder), spec, part_rows
        self._wanted = _distinct(digests)
        self._sealed: dict[Path, PartLayout] = {}  # those seen already: they never change, and opening takes its time
        self._lock: FolderLock | None = None
        try:
            with _disk(self.folder):
                _open_folder(self.folder)
                self._lock = FolderLock(self.folder)
                _remove_temporaries(self.folder)
                self._remove_leftovers()
                missing = self._missing()
                self.reused = len(self._wanted) - len(missing)
                """How many of the wanted images were stored already."""
                origins = find_rows(sources, spec, missing)
                self._plan(missing, origins)
                self.copied = self._copy(origins, io)
                """How many were copied from another cache."""
                self.parts: list[Path] = [part.path for part in self._in_progress()]
                """The parts in work, all with rows to be written."""
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the folder; what was written stays."""
        if self._lock:
            self._lock.release()
            self._lock = None

    def rows(self) -> dict[bytes, int]:
        """Digest -> row in the cache, of every wanted image that is stored in a sealed part."""
        found: dict[bytes, int] = {}
        base = 0
        for part in self._layouts():
            if _is_partial(part) or not (part.crc32 >= 0).any():
                continue  # neither gets into the manifest
            for digest, row in _stored(part):
                if digest in self._wanted:
                    found.setdefault(digest, base + row)
            base += part.rows
        return found

    def images(self) -> dict[str, np.ndarray[Any, Any]]:
        """Digests (rows, 32) of the images of every part, by the name that it has when it is sealed."""
        return {_sealed_name(part.path): part.digests for part in self._layouts()}

    def finish(
        self,
        texts: Mapping[str, TextTable],
        attachments: Mapping[str, bytes] | None = None,
        provenance: Mapping[str, Any] | None = None,
        thumbnails: Mapping[str, str] | None = None,
    ) -> None:
        """Writes the text of each split and the attachments, then the manifest: the cache is finished in one step.

        `image_row` of the texts are rows as in `rows`; `thumbnails` are by part the SHA-256 of those that were saved.
        Raises CacheError for a text that names a row which is not stored, for a split whose name is no file name, and
        if a part is still in work.
        """
        with _disk(self.folder):
            layouts = self._layouts()
            if any(map(_is_partial, layouts)):
                raise CacheError(
                    f"{self.folder}: a part is in work. Run `pipe precompute` again: it goes on from here."
                )
            layouts = [part for part in layouts if (part.crc32 >= 0).any()]
            stored = np.concatenate([np.empty(0, bool), *(part.crc32 >= 0 for part in layouts)])
            for split, table in texts.items():
                if len(table) and not (table.image_row.max() < len(stored) and stored[table.image_row].all()):
                    raise CacheError(f"text of split {split}: image_row names rows that are not in {self.folder}")
            shown = {part.path.name: (thumbnails or {}).get(part.path.name) for part in layouts}
            hashed = {name: hashlib.sha256(data).hexdigest() for name, data in (attachments or {}).items()}
            for name, sha256 in hashed.items():
                path = self.folder / attachment_file(name, sha256)
                write_atomically(path, (attachments or {})[name], self.folder / ATTACHMENT_TEMPORARY)
            manifest = Manifest(
                spec=self.spec,
                part_rows=self.part_rows,
                parts=[part_entry(part) for part in layouts],
                rows=int(stored.sum()),
                splits={split: self._save_text(split, table) for split, table in texts.items()},
                attachments=hashed | {thumbnails_name(part): sha256 for part, sha256 in shown.items() if sha256},
                provenance=dict(provenance or {}),
            )
            own = own_files(self.folder)  # by the old manifest: what it alone needed goes
            manifest.save(self.folder)
            for path in own:
                if path.name not in {*listed_files(manifest), MANIFEST_NAME, LOCK_NAME}:
                    path.unlink()

    def _save_text(self, split: str, table: TextTable) -> TextEntry:
        """Writes the text of a split, if the finished cache has not the very same."""
        with suppress(CacheError):  # no finished cache, no such split, or it is damaged
            reader = FeatureReader(self.folder)
            if reader.text(split).equals(table):
                return reader.manifest.splits[split]
        return table.save(self.folder, split)

    def _layouts(self) -> list[PartLayout]:
        layouts = part_layouts(self.folder, self.spec, self._sealed)
        self._sealed = {part.path: part for part in layouts if not _is_partial(part)}
        return layouts

    def _in_progress(self) -> list[PartLayout]:
        return [part for part in self._layouts() if _is_partial(part)]

    def _remove_leftovers(self) -> None:
        """Removes what a repair left that was killed: parts with a listed part's very images, and in no plan."""
        listed, plan = _listed(self.folder, self.spec), Plan.load(self.folder).parts
        layouts = self._layouts() if listed else []
        images = {part.digests.tobytes() for part in layouts if part.path.name in listed}
        for part in layouts:
            unknown = part.path.name not in listed and _sealed_name(part.path) not in plan
            if unknown and part.digests.tobytes() in images:
                part.path.unlink()

    def _missing(self) -> dict[bytes, None]:
        """The wanted images that no part has, in order."""
        stored = {digest for part in self._layouts() for digest, _ in _stored(part) if digest in self._wanted}
        return {digest: None for digest in self._wanted if digest not in stored}

    def _plan(self, missing: dict[bytes, None], origins: Mapping[bytes, Any]) -> None:
        """Has a part in work for every missing image, those to be copied apart from those to be encoded."""
        unplanned = dict(missing)
        for part in self._in_progress():
            planned = {part.digests[row].tobytes() for row in np.flatnonzero(part.crc32 == NOT_WRITTEN)}
            if planned and all(digest in unplanned for digest in planned):
                for digest in planned:
                    del unplanned[digest]
            else:
                PartWriter(part.path).seal()
        to_copy = [digest for digest in unplanned if digest in origins]
        to_encode = [digest for digest in unplanned if digest not in origins]
        names = free_names(self.folder, _listed(self.folder, self.spec))
        new: list[Path] = []
        for chunk in [*_chunks(to_copy, self.part_rows), *_chunks(to_encode, self.part_rows)]:
            digests = np.frombuffer(b"".join(chunk), np.uint8).reshape(-1, DIGEST_BYTES)
            new.append(self.folder / f"{next(names)}.partial")
            create_part(temporary_path(new[-1]), self.spec, digests)
        self._guard(new)
        for path in new:
            rename(temporary_path(path), path)

    def _guard(self, new: Sequence[Path]) -> None:
        """Notes what the begun parts are, and the `new` ones before they get their names.

        So no later run lets HDF5 open a damaged one.
        """
        listed = _listed(self.folder, self.spec)
        begun = {_sealed_name(part.path): part for part in self._layouts()}
        begun |= {_sealed_name(path): inspect_part(temporary_path(path)) for path in new}
        plan = Plan({name: _planned(name, part) for name, part in begun.items() if name not in listed})
        if plan != Plan.load(self.folder):
            plan.save(self.folder)

    def _copy(self, origins: Mapping[bytes, tuple[Path, int]], io: str) -> int:
        """Fills open rows of the parts in work from other caches; -> how many."""
        copied = 0
        reader = cache(lambda folder: FeatureReader(folder, io))
        for layout in self._in_progress():
            with PartWriter(layout.path) as part:
                copied += _copy_rows(part, origins, reader)
                if not part.unwritten_rows.size:
                    part.seal()
        return copied


@dataclass(frozen=True)
class WriteEstimate:
    """What there is before any work: numbers of distinct images."""

    wanted: int
    stored: int
    """In the cache already."""
    copyable: int
    """In another cache of equal spec, to be copied."""
    bytes_needed: int
    """On disk, for those not stored."""
    missing: Sequence[bytes] = field(repr=False)
    """Digests of those to be encoded, in order."""

    @property
    def to_encode(self) -> int:
        return len(self.missing)


def estimate_write(
    folder: Path, spec: CacheSpec, digests: Sequence[bytes], sources: Sequence[Path] = (), part_rows: int = PART_ROWS
) -> WriteEstimate:
    """What a `FeatureWriter` would find; changes nothing. Raises CacheError as it does."""
    wanted = _distinct(digests)
    layouts = _layouts_meanwhile(folder, spec) if folder.is_dir() else []
    stored = {digest for part in layouts for digest, _ in _stored(part) if digest in wanted}
    missing = {digest: None for digest in wanted if digest not in stored}
    nearby = find_rows(sources, spec, missing)
    to_encode = [digest for digest in missing if digest not in nearby]
    parts = -(-len(nearby) // part_rows) + -(-len(to_encode) // part_rows)
    bytes_needed = len(missing) * (spec.row_bytes + _DIGEST_AND_CRC) + parts * _HEAD_BYTES
    return WriteEstimate(len(wanted), len(stored), len(nearby), bytes_needed, to_encode)


def sibling_caches(folder: Path, spec: CacheSpec) -> list[Path]:
    """The other finished caches of equal spec in the parent folder of `folder`."""
    beside = sorted(path.parent for path in folder.absolute().parent.glob(f"*/{MANIFEST_NAME}"))
    return [path for path in beside if path != folder.absolute() and _spec_of(path) == spec]


def find_rows(sources: Sequence[Path], spec: CacheSpec, digests: Container[bytes]) -> dict[bytes, tuple[Path, int]]:
    """Of `digests`, those that caches of equal `spec` in `sources` store: the cache's folder and the row in it."""
    found: dict[bytes, tuple[Path, int]] = {}
    for folder in sources:
        with _damaged_is_no_source():
            reader = FeatureReader(folder)
            for digest, row in reader.stored() if reader.spec == spec else ():
                if digest in digests:
                    found.setdefault(digest, (folder, row))
    return found


def part_layouts(
    folder: Path, spec: CacheSpec, seen: Mapping[Path, PartLayout] = MappingProxyType({})
) -> list[PartLayout]:
    """The parts in `folder`, found sound, in the order that numbers rows: the manifest's, then by name.

    Those `seen` before, sealed and by the only writer, are not open_descriptor again.
    Raises CacheError for a part that is not what was written, or is of another spec than `spec`.
    """
    listed = _listed(folder, spec)
    plan = Plan.load(folder).parts
    names = {_sealed_name(path): path for path in folder.iterdir() if PART_NAME.fullmatch(path.name)}
    order = [*listed, *sorted(name for name in names if name not in listed)]
    layouts = []
    for name in order:
        path = names.get(name)
        if path is None:
            continue  # deleted by hand: its images are missing, and encoded again
        if path in seen:
            layouts.append(seen[path])
            continue
        if name in listed:
            listed[name].check(folder, spec.row_bytes)
        elif name in plan:
            plan[name].check(path)
        elif listed or plan:
            layouts.append(inspect_unlisted(path, spec))
            continue
        layouts.append(inspect_part(path))
        _require(spec, layouts[-1].spec, path)
    return layouts


def inspect_unlisted(path: Path, spec: CacheSpec) -> PartLayout:
    """A part that neither the manifest nor the plan names; DamagedFileError if it cannot be one of this cache."""
    try:
        layout = inspect_part(path)
        if layout.spec != spec:
            raise DamagedFileError(path, "holds features of another kind", "")
        return layout
    except DamagedFileError as error:
        advice = "Delete this one file and run the same command again."
        raise DamagedFileError(path, f"is no part of this cache: {error.problem}", advice) from error


def _layouts_meanwhile(folder: Path, spec: CacheSpec) -> list[PartLayout]:
    """`part_layouts` of a folder in which another process may be giving parts their names."""
    while True:
        before = {path.name for path in folder.iterdir()}
        try:
            return part_layouts(folder, spec)
        except (CacheError, OSError):
            if {path.name for path in folder.iterdir()} == before:
                raise


def _copy_rows(
    part: PartWriter, origins: Mapping[bytes, tuple[Path, int]], reader: Callable[[Path], FeatureReader]
) -> int:
    """Copies the open rows that are somewhere else and undamaged there; -> how many."""
    copied = 0
    for row in part.unwritten_rows.tolist():
        origin = origins.get(part.digests[row].tobytes())
        if origin is None:
            continue
        folder, there = origin
        features = None
        with _damaged_is_no_source():  # what is damaged there is encoded like the others
            features = reader(folder).gather(np.array([there]))
        if features is not None:
            part.write(np.array([row]), features)
            copied += 1
    return copied


@contextmanager
def _damaged_is_no_source() -> Iterator[None]:
    """Passes over a cache that cannot be copied from; its own use will say so. Of this process's limits it says."""
    try:
        yield
    except CacheError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in (EMFILE, ENFILE, ENOMEM):
            raise


def _distinct(digests: Sequence[bytes]) -> dict[bytes, None]:
    wanted = dict.fromkeys(digests)
    if any(len(digest) != DIGEST_BYTES for digest in wanted):
        raise CacheError(f"an image digest must be SHA-256, {DIGEST_BYTES} bytes")
    return wanted


def _stored(part: PartLayout) -> Iterator[tuple[bytes, int]]:
    """Digest and row of every stored row of a part."""
    return ((part.digests[row].tobytes(), row) for row in np.flatnonzero(part.crc32 >= 0).tolist())


def _chunks(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _sealed_name(path: Path) -> str:
    return path.name.removesuffix(".partial")


def _is_partial(part: PartLayout) -> bool:
    return part.path.suffix == ".partial"


def _listed(folder: Path, spec: CacheSpec) -> dict[str, PartEntry]:
    """The parts of the manifest, if there is one, by name and in its order."""
    if not (folder / MANIFEST_NAME).exists():
        return {}
    manifest = Manifest.load(folder)
    _require(spec, manifest.spec, folder / MANIFEST_NAME)
    return {part.file: part for part in manifest.parts}


def free_names(folder: Path, listed: Container[str]) -> Iterator[str]:
    """Part names, lowest first, that neither a file nor the manifest has.

    A part that was deleted by hand keeps its name: the old manifest must not mean another file.
    """
    taken = {_sealed_name(path) for path in folder.iterdir()}
    names = (part_name(index) for index in count())
    return (name for name in names if name not in taken and name not in listed)


def _planned(name: str, part: PartLayout) -> PlannedPart:
    place = (part.features_offset, part.crc_offset, part.rows)
    return PlannedPart(name, *place, head_sha256(part.path, *place))


def part_entry(part: PartLayout) -> PartEntry:
    return PartEntry(part.path.name, part.rows, part.features_offset, sha256_of(part.path, part.features_offset))


def _spec_of(folder: Path) -> CacheSpec | None:
    try:
        return Manifest.load(folder).spec
    except CacheError:
        return None


def check_usable(folder: Path) -> None:
    """Raises CacheError if there is something at `folder` that is neither an empty folder nor a cache."""
    if folder.exists() and not folder.is_dir():
        raise CacheError(f"{folder}: not a folder. Choose another `cache.dir`.")
    if not folder.exists() or holds_cache(folder):
        return
    own = own_files(folder)  # a lock, say, of a run that was killed when it began
    if foreign := sorted(path.name for path in folder.iterdir() if path not in own):
        raise CacheError(f"{folder}: holds other files ({foreign[0]}, ...), no cache. Choose another `cache.dir`.")


def _open_folder(folder: Path) -> None:
    """Creates the folder, or finds it empty or a cache's."""
    check_usable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fsync_folder(folder.parent)


def _remove_temporaries(folder: Path) -> None:
    """Removes files that were never finished."""
    for path in own_files(folder):
        if path.name.endswith(TEMPORARY):
            path.unlink()


def _require(wanted: CacheSpec, found: CacheSpec, path: Path) -> None:
    if found != wanted:
        lines = "\n".join(f"  {line}" for line in found.diff(wanted))
        raise CacheError(
            f"{path}: the features in this cache are of another kind:\n{lines}\n"
            f"Choose another `cache.dir`, or delete this cache with `pipe cache rm {path.parent}` if it is no longer "
            "needed."
        )


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"{folder}: {error}. What is written stays good: once that is mended, run the same command again."
        ) from error
