"""Rows of other caches that a writer can copy instead of encoding their images."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from errno import EMFILE, ENFILE, ENOMEM
from pathlib import Path

import numpy as np

from cache.manifest import MANIFEST_NAME, Manifest
from cache.part import PartWriter
from cache.reader import FeatureReader
from cache.spec import CacheError, CacheSpec

Origins = Mapping[bytes, tuple[Path, int]]
"""Digest of an image -> folder of the cache that stores its features, and the row there."""


def sibling_caches(folder: Path, spec: CacheSpec) -> list[Path]:
    """Return the other finished caches of equal spec in the parent folder of `folder`."""
    siblings = sorted(path.parent for path in folder.absolute().parent.glob(f"*/{MANIFEST_NAME}"))
    return [path for path in siblings if path != folder.absolute() and _spec_of(path) == spec]


def find_rows(sources: Sequence[Path], spec: CacheSpec, digests: Container[bytes]) -> Origins:
    """Return where the images `digests` are stored in `sources`, those of equal `spec`."""
    found: dict[bytes, tuple[Path, int]] = {}
    for folder in sources:
        with _skip_damaged():
            reader = FeatureReader(folder)
            for digest, row in reader.stored() if reader.spec == spec else ():
                if digest in digests:
                    found.setdefault(digest, (folder, row))
    return found


def copy_rows(part: PartWriter, origins: Origins, open_reader: Callable[[Path], FeatureReader]) -> int:
    """Fill unwritten rows of `part` from their origins, except damaged ones; return how many."""
    copied = 0
    for row in part.unwritten_rows.tolist():
        origin = origins.get(part.digests[row].tobytes())
        if origin is None:
            continue
        folder, source_row = origin
        features = None
        with _skip_damaged():  # a damaged row is encoded like the others
            features = open_reader(folder).gather(np.array([source_row]))
        if features is not None:
            part.write(np.array([row]), features)
            copied += 1
    return copied


@contextmanager
def _skip_damaged() -> Iterator[None]:
    """Ignore a cache or row that cannot be read. Raises CacheError if only this process's limits are the cause."""
    try:
        yield
    except CacheError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in (EMFILE, ENFILE, ENOMEM):
            raise


def _spec_of(folder: Path) -> CacheSpec | None:
    try:
        return Manifest.load(folder).spec
    except CacheError:
        return None
