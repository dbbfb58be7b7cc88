"""Thumbnails: a small image file for each row of a part, for reports."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache.files import rename, sha256_of, temporary_path
from cache.format import DIGEST_BYTES
from cache.hdf5 import read_arrays, write_arrays
from cache.manifest import ATTACHMENT_FILE, Manifest, attachment_file
from cache.spec import FORMAT_VERSION, CacheError, DamagedFileError
from cache.text import Ragged


@dataclass(frozen=True, eq=False)
class Thumbnails:
    """The thumbnails of one part.

    Raises:
        CacheError: The columns have different numbers of rows.
    """

    digests: np.ndarray[Any, Any]
    """(rows, 32) uint8: SHA-256 of the image files, equal to the part's."""
    images: Ragged
    """uint8: one JPEG, PNG, WebP or GIF file per row, empty if there is none."""
    longer_side: int
    """Maximum side of the thumbnails that were scaled down, in pixels."""

    def __post_init__(self) -> None:
        """Check the columns."""
        if self.digests.shape != (len(self.images), DIGEST_BYTES) or self.digests.dtype != np.uint8:
            raise CacheError(
                f"image_digest is {self.digests.shape} {self.digests.dtype}, pictures have {len(self.images)} rows"
            )

    def save(self, folder: Path, part: str) -> str:
        """Write the attachment that belongs to `part`, a file name; return its SHA-256.

        After an interrupted run `find_thumbnails` finds the file, although no manifest lists it yet.

        Raises CacheError, OSError.
        """
        name = thumbnails_name(part)
        arrays = {"image_digest": self.digests, "pictures": self.images.values, "offsets": self.images.offsets}
        temporary = temporary_path(folder / name)
        write_arrays(temporary, arrays, {"format_version": FORMAT_VERSION, "longer_side": self.longer_side})
        sha256 = sha256_of(temporary)
        rename(temporary, folder / attachment_file(name, sha256))
        return sha256

    @classmethod
    def load(cls, path: Path) -> "Thumbnails":
        """Load the thumbnails that `save` wrote. Raises FileError if the file is damaged."""
        arrays, attributes = read_arrays(path)
        try:
            images = Ragged(arrays["pictures"], arrays["offsets"])
            return cls(arrays["image_digest"], images, int(attributes["longer_side"]))
        except (CacheError, KeyError, ValueError) as error:
            problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            advice = "Run `pipe precompute` again to recreate the thumbnails."
            raise DamagedFileError(path, problem, advice) from error


def thumbnails_name(part: str) -> str:
    """Return the name of the attachment with the thumbnails of a part."""
    return part.replace("features-", "thumbnails-")


def thumbnails_bytes(folder: Path, manifest: Manifest) -> int:
    """Return the size of all thumbnail files of a finished cache in bytes, without missing ones."""
    names = [thumbnails_name(part.file) for part in manifest.parts]
    listed = [(name, manifest.attachments[name]) for name in names if name in manifest.attachments]
    paths = [folder / attachment_file(name, sha256) for name, sha256 in listed]
    return sum(path.stat().st_size for path in paths if path.exists())


def find_thumbnails(folder: Path, part: str) -> Iterator[tuple[str, Thumbnails]]:
    """Yield the SHA-256 and the thumbnails of each sound file that an earlier run wrote for a part."""
    for path in sorted(folder.glob(f"{Path(thumbnails_name(part)).stem}-*.h5")):
        with suppress(CacheError, OSError):
            sha256 = sha256_of(path)
            if ATTACHMENT_FILE.fullmatch(path.name) and sha256.startswith(path.stem[-12:]):
                yield sha256, Thumbnails.load(path)
