"""Turn image files into pixel values (3, H, W): upright 8-bit RGB, then the processing of the checkpoint, bit for bit.

Bytes are read once (`read_image_bytes`) and passed on, so that digest and pixels are those of the same bytes. All
functions are thread-safe.
"""

import errno
import hashlib
import json
import logging
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from cache import portability
from pipeline.common.errors import PipelineError
from pipeline.common.terminal import locale_problem
from pipeline.data.image_sources import ImageSource
from pipeline.encoding.decoding import RULES, has_transparency, is_preview, is_rescaled, upright_rgb, upright_turn
from pipeline.encoding.file_types import CAMERA_RAW, describe_unknown_file, describe_unreadable_image
from pipeline.encoding.image_processor import load_image_processor

# For the whole process, since `warnings.catch_warnings` is not thread-safe. Images that Pillow only warns about (odd
# EXIF, palettes, 89 to 179 million pixels) are decoded; what it logs is repeated in the error that it raises next.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

# Pillow loads its file formats on first use, which is not thread-safe.
Image.preinit()
Image.init()

# Pillow decodes EPS by running Ghostscript; here no program is run. The other formats it can only identify.
_FORMATS = [name for name in Image.ID if name not in {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}]

_REASONS = {
    errno.ENOENT: "not found",
    errno.ENOTDIR: "not found: a component of its path is a file, not a folder",
    errno.EISDIR: "a folder, not a file",
    errno.ELOOP: "symbolic links form a loop",
    errno.ENAMETOOLONG: "its name is too long",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENXIO: "not a regular file",  # a socket, or a device without a driver
}

_NO_MEMORY = "not enough memory to read it"

MAX_KEPT_BYTES = 4 << 10
"""Size up to which an image file is its own thumbnail."""
_BROWSER_FORMATS = {"JPEG", "PNG", "WEBP", "GIF"}

MAX_FILE_BYTES = 1 << 30
"""Maximum size of an image file, far above any that Pillow decodes."""


class ImageError(PipelineError):
    """Why an image is invalid, in one line, without its path, which the caller knows."""


class ImageUnreachableError(ImageError):
    """The image cannot be read now, though it may be valid: not found, not readable, out of memory."""


def read_image_bytes(image: ImageSource) -> bytes:
    """Return the encoded bytes of an image, from a file, a table or memory. Symbolic links are followed.

    Raises:
        ImageUnreachableError: not found, or not readable.
        ImageError: not a regular file (pipes and devices are rejected without waiting), larger than `MAX_FILE_BYTES`,
            or a table row without an image.
    """
    if isinstance(image, Path):
        return _read_file(image)
    try:
        stored = image.stored()
    except (OSError, ValueError) as error:
        raise ImageUnreachableError(f"cannot be read: {_one_line(error)}") from None
    if stored is None:
        raise ImageError("no image in this row")
    return _read_file(stored) if isinstance(stored, Path) else stored


def _read_file(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | portability.BINARY | portability.DONT_WAIT)
        try:
            _check_regular(os.fstat(descriptor))
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)
    except OSError as error:
        reason = _REASONS.get(error.errno or 0) or f"cannot be read: {_one_line(error.strerror or error)}"
        raise ImageUnreachableError(reason) from None
    except MemoryError:
        raise ImageUnreachableError(_NO_MEMORY) from None
    except ValueError:  # a zero byte, or half of a surrogate pair
        raise ImageError(locale_problem(str(path)) or "not found: not a valid file name") from None


def image_digest(data: bytes) -> bytes:
    """Return the SHA-256 of the bytes of an image file."""
    return hashlib.sha256(data).digest()


def check_header(data: bytes) -> bool:
    """Check the header of an image file without decoding it, in far less than a millisecond.

    Returns:
        Whether the pixels will be scaled to their own range, as those with more than 8 bits or float values are.

    Raises:
        ImageError: empty, of no format that Pillow knows, or with more pixels than Pillow decodes.
    """
    with _open(data) as image:
        return is_rescaled(image)


def thumbnail(data: bytes, longer_side: int) -> bytes:
    """Return a small JPEG of what the encoder sees.

    A file of at most `MAX_KEPT_BYTES` is returned as it is, if browsers show it in the same way.

    Args:
        data: bytes of the image file.
        longer_side: maximum width and height, in pixels.

    Raises:
        ImageError: as `Preprocessor` does.
    """
    with _open(data) as image:
        if len(data) <= MAX_KEPT_BYTES and _shown_alike(image):
            return data
        image.draft("RGB", (longer_side, longer_side))  # a JPEG is decoded at a fraction of its size
        small = upright_rgb(image)
        small.thumbnail((longer_side, longer_side))
        file = BytesIO()
        small.save(file, "JPEG", quality=70)
        return file.getvalue()


def _shown_alike(image: Image.Image) -> bool:
    """Return whether a browser shows what the encoder sees: no animation, transparency or EXIF orientation."""
    return (
        image.format in _BROWSER_FORMATS
        and image.mode in {"1", "L", "P", "RGB"}
        and not has_transparency(image)
        and not getattr(image, "is_animated", False)
        and upright_turn(image) is None
    )


class Preprocessor:
    """Upright RGB, and resize, rescale and normalize of the checkpoint, always by Pillow: other backends differ.

    A uint8 pixel has only 256 values per channel, so rescale and normalize are looked up in a table that the processor
    itself has filled. The processor would compute the same values for each pixel.
    """

    size: tuple[int, int]  # (H, W)

    def __init__(self, checkpoint_folder: Path):
        """Load the settings. Raises `PipelineError` for a processor with other steps or without a fixed size."""
        self.processor = load_image_processor(checkpoint_folder)
        self.size = _check_processor(self.processor, checkpoint_folder)
        self._resample = Image.Resampling(int(self.processor.resample))
        self._table = _pixel_table(self.processor)

    def __call__(self, data: bytes) -> np.ndarray:
        """Return pixel values (3, H, W), float32, of the bytes of an image file; of an animation its first frame.

        Raises:
            ImageError: as `check_header`, or because the image cannot be decoded.
        """
        with _open(data) as image:
            return self._pixel_values(image)

    def from_image(self, image: Image.Image) -> np.ndarray:
        """Return pixel values (3, H, W), float32, of an image in memory: those of the file it was opened from.

        Raises:
            ImageError: the image cannot be decoded.
        """
        try:
            return self._pixel_values(image)
        except MemoryError:
            raise ImageUnreachableError(_NO_MEMORY) from None
        except Exception as error:  # a broken file raises anything: OSError, SyntaxError, struct.error, ...
            raise ImageError(f"cannot be decoded: {_one_line(error)}") from None

    def _pixel_values(self, image: Image.Image) -> np.ndarray:
        height, width = self.size
        pixels = np.asarray(upright_rgb(image).resize((width, height), self._resample))
        values = np.empty((3, height, width), np.float32)
        for channel in range(3):
            # Indices of type uint8 are never clipped; the default mode would buffer the output.
            np.take(self._table[channel], pixels[..., channel], out=values[channel], mode="clip")
        return values

    def settings_json(self) -> str:
        """Return everything that determines the pixel values, as canonical JSON."""
        names = ("size", "resample", "do_resize", "do_rescale", "rescale_factor", "do_normalize", "do_convert_rgb")
        settings = {name: getattr(self.processor, name) for name in (*names, "image_mean", "image_std")}
        settings["resample"] = int(settings["resample"])
        settings["size"] = {side: settings["size"][side] for side in ("height", "width")}
        return json.dumps(settings | RULES | {"backend": "pil"}, sort_keys=True)


def _check_processor(processor: Any, folder: Path) -> tuple[int, int]:
    """Return the processor's (H, W), if it has exactly the steps of `Preprocessor`."""
    for name in ("do_resize", "do_convert_rgb"):
        if not getattr(processor, name):
            raise PipelineError(f"{folder}: the image processor has {name} false, and only true is supported")
    for name in ("do_center_crop", "do_pad"):
        if getattr(processor, name, None):
            raise PipelineError(f"{folder}: the image processor has {name} true, and only false is supported")
    size = {side: length for side, length in dict(processor.size).items() if length is not None}
    if set(size) != {"height", "width"}:
        raise PipelineError(f"{folder}: the image processor's size is not a height and a width")
    if processor.resample not in set(Image.Resampling):
        raise PipelineError(f"{folder}: the image processor's resample is {processor.resample!r}, which Pillow lacks")
    return int(size["height"]), int(size["width"])


def _pixel_table(processor: Any) -> np.ndarray:
    """Return the processor's output for each uint8 value: (3, 256) float32."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)  # an image 256 wide and 1 high
    values = processor(Image.fromarray(ramp), do_resize=False, return_tensors="np")["pixel_values"]
    return np.ascontiguousarray(values[0].reshape(3, 256), np.float32)


def _check_regular(found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise ImageError(_REASONS[errno.EISDIR])
    if not stat.S_ISREG(found.st_mode):
        raise ImageError("not a regular file")
    if found.st_size > MAX_FILE_BYTES:
        raise ImageError(f"too large ({found.st_size} bytes, at most {MAX_FILE_BYTES})")


@contextmanager
def _open(data: bytes) -> Iterator[Image.Image]:
    """Open an image lazily; errors of Pillow, here or in the body, become an `ImageError`."""
    if not data:
        raise ImageError("empty file")
    try:
        with Image.open(BytesIO(data), formats=_FORMATS) as image:
            if is_preview(image):
                raise ImageError(CAMERA_RAW)
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(describe_unknown_file(data)) from None
    except Image.DecompressionBombError as error:
        pixels = ", at most ".join(re.findall(r"\d+", str(error)))
        raise ImageError(f"too many pixels ({pixels})") from None
    except MemoryError:
        raise ImageUnreachableError(_NO_MEMORY) from None
    except Exception as error:  # a broken file raises anything: OSError, SyntaxError, struct.error, ...
        raise ImageError(describe_unreadable_image(data) or f"cannot be decoded: {_one_line(error)}") from None


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
