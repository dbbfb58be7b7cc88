"""Writing a cache: rows that survive a kill at any moment, and are never encoded twice."""

import errno
import fcntl
import os
import re
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cache.files import TEMPORARY, as_bytes, fsync_folder, pwrite_all, rename
from cache.format import DIGEST_BYTES, NOT_WRITTEN, PART_NAME, PartLayout, create_part, inspect_part, part_name
from cache.manifest import MANIFEST_NAME, Manifest, text_name
from cache.spec import CacheError, CacheSpec
from cache.text import TextTable

LOCK_PATIENCE = 10  # seconds

_OWN_NAME = re.compile(rf"({PART_NAME.pattern}|text-.+\.h5|{re.escape(MANIFEST_NAME)})({re.escape(TEMPORARY)})?")
_EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}  # all set: infinite or not a number


class FeatureWriter:
    """Fills the cache in `folder` with the features of the wanted images, going on with what is there already.

    `digests` are the SHA-256 digests (32 bytes each) of the wanted image files. A part in work is gone on with if
    all that it waits for is wanted; otherwise it is sealed as it is, and its open rows are never served. Only one
    writer works in a folder at a time, a second is refused.

    Raises CacheError if the folder holds other things only, or a part that is of another spec or not sound.
    """

    def __init__(self, folder: Path, spec: CacheSpec, digests: Sequence[bytes], part_rows: int = 4096) -> None:
        if part_rows < 1:
            raise CacheError(f"a part must have at least 1 row, not {part_rows}")
        wanted = list(dict.fromkeys(digests))
        if any(len(digest) != DIGEST_BYTES for digest in wanted):
            raise CacheError(f"an image digest must be SHA-256, {DIGEST_BYTES} bytes")
        self.folder, self.spec, self.part_rows = Path(folder), spec, part_rows
        self.pending: list[bytes] = wanted
        """Digests of the images still to come, in the order in which `write` takes them."""
        self.rows: dict[bytes, int] = {}
        """Digest -> row in the cache, for every stored image: rows are counted through all parts."""
        self._sealed: list[tuple[str, int]] = []
        self._part: _PartInWork | None = None
        self._lock: int | None = None
        try:
            with self._disk():
                _open_folder(self.folder)
                self._lock = _lock(self.folder)
                self._next_index, layouts = _survey(self.folder, spec)
                for layout in layouts:
                    self._adopt(layout)
                self.pending = self._plan(wanted)
        except BaseException:
            self.close()
            raise
        self.reused = len(wanted) - len(self.pending)
        """How many of the wanted images were stored already."""

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the part in work; what was written stays. The next writer goes on from there."""
        if self._part:
            self._part.close()
            self._part = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write(self, digests: Sequence[bytes], features: np.ndarray[Any, Any]) -> None:
        """Stores features (n, Q, D), in the spec's storage type, of the next n `pending` images.

        A kill loses at most the rows of the call that it hits. Raises CacheError if the features are of another
        shape or type or not finite (then none is stored), or if the disk does not take them.
        """
        assert list(digests) == self.pending[: len(digests)], "images must come in the order of `pending`"
        self._check(digests, features)
        with self._disk():
            while len(features):
                part = self._part or self._begin()
                base = sum(rows for _, rows in self._sealed)
                stored = part.store(features)
                self.rows |= {digest: base + row for digest, row in zip(self.pending, stored, strict=False)}
                del self.pending[: len(stored)]
                features = features[len(stored) :]
                if not part.open_rows:
                    self._seal(part)

    def finish(self, texts: Mapping[str, TextTable], provenance: Mapping[str, str]) -> None:
        """Writes the text of each split, then the manifest: from then on the cache is finished.

        `image_row` of the texts are rows as in `rows`. Nothing may be pending. Raises CacheError for a text that
        names a row which is not stored, or a split whose name is no file name.
        """
        assert not self.pending, f"{len(self.pending)} images are still to be written"
        stored = np.fromiter(self.rows.values(), np.int64, len(self.rows))
        for split, table in texts.items():
            if not np.isin(table.image_row, stored).all():
                raise CacheError(f"text of split {split}: image_row names rows that are not in {self.folder}")
        manifest = Manifest(
            spec=self.spec,
            part_rows=self.part_rows,
            parts=self._sealed,
            rows=len(self.rows),
            splits={split: (text_name(split), len(table)) for split, table in texts.items()},
            provenance=dict(provenance),
        )
        with self._disk():
            for split, table in texts.items():
                table.save(self.folder / text_name(split))
            manifest.save(self.folder)

    def _adopt(self, layout: PartLayout) -> None:
        """Counts the rows of a part that is there; one in work, always the last, is kept open."""
        base = sum(rows for _, rows in self._sealed)
        for row in np.flatnonzero(layout.crc32 != NOT_WRITTEN).tolist():
            self.rows.setdefault(layout.digests[row].tobytes(), base + row)
        if layout.path.suffix == ".partial":
            self._part = _PartInWork(layout)
        else:
            self._sealed.append((layout.path.name, layout.rows))

    def _plan(self, wanted: list[bytes]) -> list[bytes]:
        """What is pending, in order; seals a part in work that cannot be gone on with."""
        missing = [digest for digest in wanted if digest not in self.rows]
        if not self._part:
            return missing
        planned = [self._part.layout.digests[row].tobytes() for row in self._part.open_rows]
        if not planned or not set(planned) <= set(missing):
            self._seal(self._part)
            return missing
        later = set(planned)
        return planned + [digest for digest in missing if digest not in later]

    def _begin(self) -> "_PartInWork":
        digests = np.frombuffer(b"".join(self.pending[: self.part_rows]), np.uint8).reshape(-1, DIGEST_BYTES)
        path = self.folder / part_name(self._next_index, sealed=False)
        create_part(path, self.spec, digests)
        self._next_index += 1
        self._part = _PartInWork(inspect_part(path))
        return self._part

    def _seal(self, part: "_PartInWork") -> None:
        if part.seal():
            self._sealed.append((part.sealed_path.name, part.layout.rows))
        self._part = None

    def _check(self, digests: Sequence[bytes], features: np.ndarray[Any, Any]) -> None:
        spec = self.spec
        wanted = (len(digests), spec.query_tokens, spec.width)
        if features.shape != wanted or features.dtype != spec.storage_dtype:
            found = f"{features.shape} {features.dtype}"
            raise CacheError(f"features are {found}, must be {wanted} {spec.storage_dtype} (for {spec.dtype})")
        bits = np.ascontiguousarray(features).view(f"<u{spec.storage_dtype.itemsize}")
        exponent = bits.dtype.type(_EXPONENT[spec.dtype])
        bad = np.flatnonzero(((bits & exponent) == exponent).any(axis=(1, 2)))
        if bad.size:
            name = digests[int(bad[0])].hex()
            raise CacheError(
                f"features of image {name} (SHA-256 of its file) are not finite in {spec.dtype}. "
                "Nothing of this batch was stored; choose a `cache.dtype` of wider range, or leave that image out."
            )

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            left = len(self.pending)
            raise CacheError(
                f"{self.folder}: {error}. The {left} images still to come need {left * self.spec.row_bytes} bytes. "
                "Once the disk takes them, run the same command again: it goes on from here."
            ) from error


class _PartInWork:
    """A `.partial` part, open for `pwrite`: HDF5 is done with it, so no kill can hurt its structure."""

    def __init__(self, layout: PartLayout) -> None:
        self.layout = layout
        self.sealed_path = layout.path.with_suffix("")
        self.open_rows: list[int] = np.flatnonzero(layout.crc32 == NOT_WRITTEN).tolist()
        self._descriptor = os.open(layout.path, os.O_RDWR | os.O_CLOEXEC)

    def store(self, features: np.ndarray[Any, Any]) -> list[int]:
        """Writes features (n, Q, D) to the first n open rows, or to all if they are fewer; -> the rows taken."""
        layout, rows = self.layout, self.open_rows[: len(features)]
        checksums = []
        for row, one in zip(rows, features, strict=False):
            data = as_bytes(one)
            pwrite_all(self._descriptor, data, layout.features_offset + row * layout.spec.row_bytes)
            checksums.append(zlib.crc32(data))
        os.fdatasync(self._descriptor)  # a CRC on disk is the promise that its row is
        for row, checksum in zip(rows, checksums, strict=True):
            pwrite_all(self._descriptor, checksum.to_bytes(8, "little"), layout.crc_offset + row * 8)
        del self.open_rows[: len(rows)]
        return rows

    def seal(self) -> bool:
        """Gives the part its final name, and True; a part without any row is removed instead, and False."""
        os.fsync(self._descriptor)
        worth_keeping = len(self.open_rows) < self.layout.rows
        if worth_keeping:
            rename(self.layout.path, self.sealed_path)
        else:
            self.layout.path.unlink()
        self.close()
        return worth_keeping

    def close(self) -> None:
        os.close(self._descriptor)


def _survey(folder: Path, spec: CacheSpec) -> tuple[int, list[PartLayout]]:
    """The index that a new part takes, and the parts there are, in order. Changes nothing that holds a row."""
    _remove_temporaries(folder)
    manifest = Manifest.load(folder) if (folder / MANIFEST_NAME).exists() else None
    if manifest:
        _require(spec, manifest.spec, folder / MANIFEST_NAME)
    found = {path.name: match for path in folder.iterdir() if (match := PART_NAME.fullmatch(path.name))}
    names = sorted(found, key=lambda name: int(found[name][1]))
    for name in names[:-1]:
        if name.endswith(".partial"):
            raise CacheError(f"{folder / name}: only the last part may be in work. Delete it: its rows are remade.")
    layouts = [inspect_part(folder / name) for name in names]
    for layout in layouts:
        _require(spec, layout.spec, layout.path)
    # A part that the manifest names but that was deleted keeps its name: the old manifest must not mean another file.
    listed = [PART_NAME.fullmatch(name) for name, _ in manifest.parts] if manifest else []
    return max((int(match[1]) + 1 for match in [*found.values(), *listed] if match), default=0), layouts


def _open_folder(folder: Path) -> None:
    """Creates the folder, or finds it empty or a cache's."""
    if folder.exists() and not folder.is_dir():
        raise CacheError(f"{folder}: not a folder. Choose another `cache.dir`.")
    folder.mkdir(parents=True, exist_ok=True)
    fsync_folder(folder.parent)
    names = [path.name for path in folder.iterdir()]
    own = [name for name in names if _OWN_NAME.fullmatch(name)]
    if names and not own:
        raise CacheError(f"{folder}: holds other files ({min(names)}, ...), no cache. Choose another `cache.dir`.")


def _lock(folder: Path) -> int:
    """Takes the folder for this process until the descriptor is closed, at the latest when the process ends.

    It waits a little: a killed run's helper processes hold the lock until they notice that they are orphans. A
    file system without such locks is used without.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                message = f"{folder}: another process is writing this cache. Run the command again when it is done."
                raise CacheError(message) from None
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                os.close(descriptor)
                raise
            return descriptor


def _remove_temporaries(folder: Path) -> None:
    """Removes files that were never finished."""
    for path in folder.iterdir():
        if path.name.endswith(TEMPORARY) and _OWN_NAME.fullmatch(path.name):
            path.unlink()


def _require(wanted: CacheSpec, found: CacheSpec, path: Path) -> None:
    if found != wanted:
        lines = "\n".join(f"  {line}" for line in found.diff(wanted))
        raise CacheError(
            f"{path}: the features in this cache are of another kind:\n{lines}\n"
            f"Choose another `cache.dir`, or delete the folder {path.parent} if it is no longer needed."
        )
