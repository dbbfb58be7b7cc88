"""Create thumbnails in background threads while images are encoded, one part of the cache at a time."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np

from cache.spec import CacheError
from cache.text import Ragged
from cache.thumbnails import Thumbnails, find_thumbnails
from pipeline.common.progress import progress_bar
from pipeline.encoding.images import MAX_KEPT_BYTES, ImageError, image_digest, thumbnail

ReadImage = Callable[[bytes], bytes | None]
"""Digest of an image -> bytes of its file, None if no question needs it; may raise `ImageError`."""


def max_thumbnail_bytes(longer_side: int) -> int:
    """Return the usual maximum size of a thumbnail on disk: two bits per pixel, or an image file kept as it is."""
    return max(MAX_KEPT_BYTES, longer_side**2 // 4) if longer_side else 0


class ThumbnailWriter:
    """Writes the thumbnails of every part of a cache in background threads, from construction on.

    As a context manager it cancels the remaining work on exit.
    """

    def __init__(
        self, folder: Path, digests: Mapping[str, np.ndarray], read: ReadImage, longer_side: int, threads: int
    ) -> None:
        """Start the threads.

        Args:
            folder: the cache.
            digests: part -> digests of its images, (rows, 32).
            read: reads an image.
            longer_side: width and height in pixels, at most; 0 creates no thumbnails.
            threads: number of threads.
        """
        self.folder = folder
        self._pool = ThreadPoolExecutor(threads, "thumbnails")
        self._parts: dict[str, Future[str]] = {}
        if longer_side:
            for part, rows in digests.items():
                self._parts[part] = self._pool.submit(_write_part, folder, part, rows, read, longer_side)

    def __enter__(self) -> "ThumbnailWriter":
        """Return the writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Cancel what has not started."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def wait(self) -> dict[str, str]:
        """Wait for all thumbnails; return the SHA-256 of each part's file. An invalid image has no thumbnail.

        Raises:
            CacheError: the disk accepts no writes.
        """
        pending = [future for future in self._parts.values() if not future.done()]
        try:
            if pending:
                with progress_bar("thumbnails", len(pending), "parts") as bar:
                    for future in pending:
                        future.result()
                        bar.update()
            return {part: future.result() for part, future in self._parts.items()}
        except OSError as error:
            advice = "Completed work is saved. Fix this and run the same command again."
            raise CacheError(f"{self.folder}: cannot write thumbnails: {error}. {advice}") from error


def _write_part(folder: Path, part: str, digests: np.ndarray, read: ReadImage, longer_side: int) -> str:
    """Write the thumbnails of one part, reusing existing ones; return the SHA-256 of their file."""
    sha256, existing = _existing_thumbnails(folder, part, digests, longer_side)
    if sha256 and all(existing):
        return sha256
    thumbnails = [
        known or _thumbnail(digest.tobytes(), read, longer_side)
        for known, digest in zip(existing, digests, strict=True)
    ]
    if sha256 and thumbnails == existing:
        return sha256
    return Thumbnails(digests, Ragged.from_rows(thumbnails, np.uint8), longer_side).save(folder, part)


def _existing_thumbnails(folder: Path, part: str, digests: np.ndarray, longer_side: int) -> tuple[str, list[bytes]]:
    """Return the SHA-256 of a part's file and its thumbnails; "" and empty ones if there is none of this size."""
    for sha256, found in find_thumbnails(folder, part):
        if found.longer_side == longer_side and np.array_equal(found.digests, digests):
            return sha256, [found.images[row].tobytes() for row in range(len(digests))]
    return "", [b""] * len(digests)


def _thumbnail(digest: bytes, read: ReadImage, longer_side: int) -> bytes:
    """Return a thumbnail; empty if the image is unneeded, changed or invalid, which the encoding loop reports."""
    try:
        data = read(digest)
        return thumbnail(data, longer_side) if data and image_digest(data) == digest else b""
    except ImageError:
        return b""
