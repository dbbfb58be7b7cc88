"""Thumbnails beside the features: a small picture file of each row of a part, for people to look at."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache.files import rename, sha256_of, temporary_path
from cache.format import DIGEST_BYTES, read_arrays, write_arrays
from cache.manifest import ATTACHMENT_FILE, Manifest, attachment_file
from cache.spec import FORMAT_VERSION, CacheError, DamagedFileError
from cache.text import Ragged


@dataclass(frozen=True, eq=False)
class Thumbnails:
    """Of the rows of one part. Raises CacheError on construction if the columns are not of the same rows."""

    digests: np.ndarray[Any, Any]
    """(rows, 32) uint8: SHA-256 of the image files, those of the part."""
    images: Ragged
    """uint8: a JPEG, PNG, WebP or GIF file each, empty where there is none."""
    longer_side: int
    """Pixels, at most, of those that were made smaller."""

    def __post_init__(self) -> None:
        if self.digests.shape != (len(self.images), DIGEST_BYTES) or self.digests.dtype != np.uint8:
            raise CacheError(f"image_digest is {self.digests.shape} {self.digests.dtype}, not that of the pictures")

    def save(self, folder: Path, part: str) -> str:
        """Writes them to the attachment of the part of that name; -> SHA-256 of the file. Raises CacheError, OSError.

        An interrupted run finds the file again: the manifest need not name it yet.
        """
        name = thumbnails_name(part)
        arrays = {"image_digest": self.digests, "pictures": self.images.values, "offsets": self.images.offsets}
        building = temporary_path(folder / name)
        write_arrays(building, arrays, {"format_version": FORMAT_VERSION, "longer_side": self.longer_side})
        sha256 = sha256_of(building)
        rename(building, folder / attachment_file(name, sha256))
        return sha256

    @classmethod
    def load(cls, path: Path) -> "Thumbnails":
        """The inverse of `save`. Raises CacheError, with the path, if the file does not hold thumbnails."""
        arrays, attributes = read_arrays(path)
        try:
            pictures = Ragged(arrays["pictures"], arrays["offsets"])
            return cls(arrays["image_digest"], pictures, int(attributes["longer_side"]))
        except (CacheError, KeyError, ValueError) as error:
            problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            advice = "Run `pipe precompute` again: it makes the thumbnails anew."
            raise DamagedFileError(path, problem, advice) from error


def thumbnails_name(part: str) -> str:
    """Name of the attachment that holds the thumbnails of a part."""
    return part.replace("features-", "thumbnails-")


def thumbnails_bytes(folder: Path, manifest: Manifest) -> int:
    """Bytes of the files of all thumbnails in a finished cache; a missing one counts nothing."""
    names = [thumbnails_name(part.file) for part in manifest.parts]
    listed = [(name, manifest.attachments[name]) for name in names if name in manifest.attachments]
    paths = [folder / attachment_file(name, sha256) for name, sha256 in listed]
    return sum(path.stat().st_size for path in paths if path.exists())


def find_thumbnails(folder: Path, part: str) -> Iterator[tuple[str, Thumbnails]]:
    """SHA-256 of the file, and thumbnails, of whatever sound files an earlier run has left for a part."""
    for path in sorted(folder.glob(f"{Path(thumbnails_name(part)).stem}-*.h5")):
        with suppress(CacheError, OSError):
            sha256 = sha256_of(path)
            if ATTACHMENT_FILE.fullmatch(path.name) and sha256.startswith(path.stem[-12:]):
                yield sha256, Thumbnails.load(path)
