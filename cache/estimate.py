"""What a write will do and how much disk it needs, known before any work."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cache.format import DIGEST_BYTES, PartLayout
from cache.parts import part_layouts, stored_rows
from cache.reuse import find_rows
from cache.spec import CacheError, CacheSpec

PART_ROWS = 1024
"""Default number of rows per full part: 48 MiB of BLIP-2's features in float16."""
_HEAD_BYTES_PER_ROW = DIGEST_BYTES + 8  # digest and CRC
_MAX_HEAD_BYTES = 36 << 10  # per part beyond these: HDF5 metadata and alignment


@dataclass(frozen=True)
class WriteEstimate:
    """What a `FeatureWriter` would find. The numbers count distinct images."""

    wanted: int
    stored: int
    """Already in the cache."""
    copyable: int
    """In another cache of equal spec."""
    bytes_needed: int
    """Disk space for the images that are not stored yet."""
    missing: Sequence[bytes] = field(repr=False)
    """Digests of the images to encode, in order."""

    @property
    def to_encode(self) -> int:
        """Number of images to encode."""
        return len(self.missing)


def estimate_write(
    folder: Path, spec: CacheSpec, digests: Sequence[bytes], sources: Sequence[Path] = (), part_rows: int = PART_ROWS
) -> WriteEstimate:
    """Return what a `FeatureWriter` with these arguments would find, without changing anything.

    Raises:
        CacheError: As raised by `FeatureWriter`.
    """
    wanted = distinct_digests(digests)
    layouts = _layouts_during_writes(folder, spec) if folder.is_dir() else []
    stored = {digest for part in layouts for digest, _ in stored_rows(part) if digest in wanted}
    missing = {digest: None for digest in wanted if digest not in stored}
    copyable = find_rows(sources, spec, missing)
    to_encode = [digest for digest in missing if digest not in copyable]
    parts = -(-len(copyable) // part_rows) + -(-len(to_encode) // part_rows)
    bytes_needed = len(missing) * (spec.row_bytes + _HEAD_BYTES_PER_ROW) + parts * _MAX_HEAD_BYTES
    return WriteEstimate(len(wanted), len(stored), len(copyable), bytes_needed, to_encode)


def distinct_digests(digests: Sequence[bytes]) -> dict[bytes, None]:
    """Return the digests without duplicates, in order. Raises CacheError for one that is not SHA-256."""
    wanted = dict.fromkeys(digests)
    if any(len(digest) != DIGEST_BYTES for digest in wanted):
        raise CacheError(f"an image digest must be SHA-256, {DIGEST_BYTES} bytes")
    return wanted


def _layouts_during_writes(folder: Path, spec: CacheSpec) -> list[PartLayout]:
    """Return the parts of a folder in which another process may be renaming parts."""
    while True:
        before = {path.name for path in folder.iterdir()}
        try:
            return part_layouts(folder, spec)
        except (CacheError, OSError):
            if {path.name for path in folder.iterdir()} == before:
                raise
