"""Where the image of a question is: a file, a row of a table, or memory."""

import hashlib
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

_NETPBM = {"L": b"P5", "RGB": b"P6"}
_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}
_TIFF_MODES = {"I", "F", "CMYK"}
_CONVERTED_MODES = {"RGBa": "RGBA", "PA": "RGBA", "La": "LA"}


@dataclass(frozen=True, order=True, slots=True)
class TableImage:
    """An image in a row of a table."""

    table: str
    row: int
    column: "ImageColumn" = field(compare=False, repr=False)

    def __str__(self) -> str:
        """Return the position, as in error messages."""
        return f"{self.table}: row {self.row}"

    def stored(self) -> bytes | Path | None:
        """Return the bytes of the image, or the file that the row names, if there is either.

        Raises:
            OSError, ValueError: the table cannot be read.
        """
        return self.column.stored(self.row)


class ImageColumn:
    """The image column of a table. Each process that reads it maps the table into its own memory."""

    def __init__(self, rows: Any, column: str, folder: Path | None, in_memory: bool = False) -> None:
        """Create the column.

        Args:
            rows: a `datasets.Dataset` in Arrow format.
            column: its name.
            folder: folder of the image files that rows may name.
            in_memory: the dataset was passed from Python. Then rows may name any file, relative ones also to the
                current folder, and a shuffled dataset is read row by row: reading the column would copy all images.
        """
        self.rows, self.column, self.folder, self.in_memory = rows, column, folder, in_memory

    def stored(self, row: int) -> bytes | Path | None:
        """Return the bytes in a row, or the file that it names, if there is either."""
        value = (self.read(slice(row, row + 1))[0] if self.in_memory else self.all[row]).as_py()
        cell = value if isinstance(value, dict) else {"path" if isinstance(value, str) else "bytes": value}
        data, path = cell.get("bytes"), cell.get("path")
        if data is not None or not path:
            return data
        if self.in_memory:
            return (self.folder or Path()).absolute() / path
        leads_out = Path(path).anchor or ".." in Path(path).parts
        return self.folder / path if self.folder and not leads_out else None

    def read(self, rows: slice) -> Any:
        """Return some rows of the column as an Arrow array."""
        return self.rows.select_columns([self.column])[rows][self.column]

    @cached_property
    def all(self) -> Any:
        """The column as an Arrow array, mapped into memory."""
        return self.read(slice(None))

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the mapped column: another process maps its own."""
        return {name: value for name, value in vars(self).items() if name != "all"}


@dataclass(frozen=True, order=True, slots=True)
class MemoryImage:
    """A PIL image passed from Python. Two images with the same pixels are equal."""

    digest: str
    """First digits of the SHA-256 of the encoded image."""
    position: str = field(compare=False)
    """Position of the record, as in error messages."""
    image: Image.Image = field(compare=False, repr=False)

    @classmethod
    def of(cls, image: Image.Image, position: str) -> "MemoryImage":
        """Create the source of an image. Raises whatever Pillow raises for an image that cannot be decoded."""
        return cls(hashlib.sha256(encode_losslessly(image)).hexdigest()[:16], position, image)

    def __str__(self) -> str:
        """Return the name of the image in the cache's text."""
        return f"in-memory image {self.digest}"

    def stored(self) -> bytes:
        """Return the encoded image."""
        return encode_losslessly(self.image)


ImageSource = Path | TableImage | MemoryImage


def encode_losslessly(image: Image.Image) -> bytes:
    """Encode an image as a file with the same pixels, turned upright by its EXIF orientation.

    8-bit RGB and grayscale become Netpbm files, whose bytes depend on the pixels alone, not on the version of Pillow or
    zlib: the digest of an image is the same on every machine. Other modes become PNG or TIFF.
    """
    image.load()
    with suppress(Exception):  # damaged EXIF, while the pixels are good
        image = ImageOps.exif_transpose(image)
    has_transparency = image.info.get("transparency") is not None
    if image.mode in _NETPBM and not has_transparency:
        return b"%s\n%d %d\n255\n" % (_NETPBM[image.mode], *image.size) + image.tobytes()
    if image.mode in _PNG_MODES:
        return _saved(image, "PNG", compress_level=1)
    if image.mode in _TIFF_MODES or image.mode.startswith("I;16"):
        return _saved(image if image.mode in _TIFF_MODES else image.convert("I"), "TIFF")
    return encode_losslessly(image.convert(_CONVERTED_MODES.get(image.mode, "RGB")))


def _saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()
