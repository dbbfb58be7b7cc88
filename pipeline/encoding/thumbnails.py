"""Thumbnails of the pictures, made beside the encoding in threads of their own, a part of the cache at a time."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from cache.spec import CacheError
from cache.text import Ragged
from cache.thumbnails import Thumbnails, find_thumbnails
from pipeline.common.progress import progress_bar
from pipeline.encoding.images import MAX_KEPT_BYTES, ImageError, image_digest, thumbnail

Read = Callable[[bytes], bytes | None]
"""Digest of a picture -> the bytes of its file, None if it is not wanted any more; may raise ImageError."""


def max_thumbnail_bytes(longer_side: int) -> int:
    """On disk, of a thumbnail, as a rule: two bits a pixel, or a picture kept as it is."""
    return max(MAX_KEPT_BYTES, longer_side**2 // 4) if longer_side else 0


@contextmanager
def making_thumbnails(
    folder: Path, images: Mapping[str, np.ndarray], read: Read, longer_side: int, threads: int
) -> Iterator[Callable[[], dict[str, str]]]:
    """Makes the thumbnails of all parts of the cache in `folder` meanwhile; none if `longer_side` is 0.

    `images` are the digests (rows, 32) of each part. What is given waits for the end: -> SHA-256 of the thumbnails of
    each part. It raises CacheError if the disk does not take them; a picture that fails has no thumbnail.
    """
    with ThreadPoolExecutor(threads, "thumbnails") as pool:
        wanted = images if longer_side else {}
        made = {part: pool.submit(_make, folder, part, wanted[part], read, longer_side) for part in wanted}
        try:
            yield lambda: _wait(folder, made)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _wait(folder: Path, made: Mapping[str, "Future[str]"]) -> dict[str, str]:
    pending = [future for future in made.values() if not future.done()]
    try:
        if pending:
            with progress_bar("thumbnails", len(pending), "parts") as bar:
                for future in pending:
                    future.result()
                    bar.update()
        return {part: future.result() for part, future in made.items()}
    except OSError as error:
        advice = "What is written stays good: once that is mended, run the same command again."
        raise CacheError(f"{folder}: cannot write thumbnails: {error}. {advice}") from error


def _make(folder: Path, part: str, digests: np.ndarray, read: Read, longer_side: int) -> str:
    """The thumbnails of one part, those taken over that are there already; -> SHA-256 of their file."""
    sha256, earlier = _earlier(folder, part, digests, longer_side)
    if sha256 and all(earlier):
        return sha256
    pictures = [
        known or _thumbnail(digest.tobytes(), read, longer_side) for known, digest in zip(earlier, digests, strict=True)
    ]
    if sha256 and pictures == earlier:
        return sha256
    return Thumbnails(digests, Ragged.from_rows(pictures, np.uint8), longer_side).save(folder, part)


def _earlier(folder: Path, part: str, digests: np.ndarray, longer_side: int) -> tuple[str, list[bytes]]:
    """SHA-256 of the file, and what it has for each picture; where there is none, none."""
    for sha256, found in find_thumbnails(folder, part):
        if found.longer_side == longer_side and np.array_equal(found.digests, digests):
            return sha256, [found.images[row].tobytes() for row in range(len(digests))]
    return "", [b""] * len(digests)


def _thumbnail(digest: bytes, read: Read, longer_side: int) -> bytes:
    """Empty if the picture is not wanted, has changed or is broken: that is told where it is encoded."""
    try:
        data = read(digest)
        return thumbnail(data, longer_side) if data and image_digest(data) == digest else b""
    except ImageError:
        return b""
