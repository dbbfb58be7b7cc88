"""Picture files -> pixel values (3, H, W): upright 8-bit RGB, then the checkpoint's own image processor, bit for bit.

Bytes are read once (`read_image_bytes`) and then passed on, so that digest and pixels are of the same bytes.
All of it may run in several threads at once.
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

from pipeline.common.errors import PipelineError
from pipeline.common.terminal import locale_problem
from pipeline.data.tables import ImageSource
from pipeline.encoding.decoding import RULES, has_transparency, is_preview, is_rescaled, upright_rgb, upright_turn
from pipeline.encoding.file_kinds import CAMERA_RAW, unreadable_image, why_not_known
from pipeline.encoding.image_processor import load_image_processor

# Once for the process and not around each call: `warnings.catch_warnings` is not safe with threads.
# What Pillow only warns of (odd EXIF, palettes, 89 to 179 million pixels) is decoded, so nobody need act on it;
# what it logs comes back as the error that it raises next.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

# Pillow loads its file formats when it first needs them, and two threads must not do that at once.
Image.preinit()
Image.init()

# Pillow passes EPS on to Ghostscript, a program: what is loaded here runs nothing. The others it only recognizes.
_FORMATS = [name for name in Image.ID if name not in {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}]

_REASONS = {
    errno.ENOENT: "not there",
    errno.ENOTDIR: "not there: a part of its path is a file, not a folder",
    errno.EISDIR: "a folder, not a file",
    errno.ELOOP: "links that loop",
    errno.ENAMETOOLONG: "its name is too long",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENXIO: "not a regular file",  # a socket, or a device without its driver
}

_NO_MEMORY = "not enough memory to read it"

KEPT_BYTES = 4 << 10  # of a picture's file: its thumbnail would hardly be smaller
_SHOWN = {"JPEG", "PNG", "WEBP", "GIF"}  # by browsers

MOST_BYTES = 1 << 30
"""Of a picture's file: far above any that Pillow would decode."""


class ImageError(PipelineError):
    """Why a picture cannot be used, in one line and without its path, which the caller knows."""


class PictureUnreachableError(ImageError):
    """The picture cannot be had now, which says nothing of it: not there, not readable, no memory."""


def read_image_bytes(picture: ImageSource) -> bytes:
    """The bytes of a picture as they are stored, in a table or in a regular file, through links.

    Raises:
        PictureUnreachableError: not there, or not readable.
        PictureError: not a regular file (pipes and devices are refused, not waited for), longer than `MOST_BYTES`,
            or neither in its row of the table nor in a file that the row names.
    """
    if isinstance(picture, Path):
        return _read_file(picture)
    try:
        stored = picture.stored()
    except (OSError, ValueError) as error:
        raise PictureUnreachableError(f"cannot be read: {_one_line(error)}") from None
    if stored is None:
        raise ImageError("no picture in this row")
    return _read_file(stored) if isinstance(stored, Path) else stored


def _read_file(path: Path) -> bytes:
    try:
        # O_NONBLOCK: opening a pipe would otherwise wait for its writer. It changes nothing for regular files.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            _check_regular(os.fstat(descriptor))
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)
    except OSError as error:
        reason = _REASONS.get(error.errno or 0) or f"cannot be read: {_one_line(error.strerror or error)}"
        raise PictureUnreachableError(reason) from None
    except MemoryError:
        raise PictureUnreachableError(_NO_MEMORY) from None
    except ValueError:  # a zero byte, or half of a surrogate pair
        raise ImageError(locale_problem(str(path)) or "not there: no file can have this name") from None


def image_digest(data: bytes) -> bytes:
    """SHA-256 of a picture file's bytes."""
    return hashlib.sha256(data).digest()


def check_header(data: bytes) -> bool:
    """Look whether a picture begins here, without decoding it: far below a millisecond.

    Returns:
        Whether its pixels will be scaled to their own range, as those of more than 8 bits or float are.

    Raises:
        PictureError: empty, of no form that Pillow knows, or of more pixels than Pillow decodes.
    """
    with _open(data) as image:
        return is_rescaled(image)


def thumbnail(data: bytes, longer_side: int) -> bytes:
    """A small picture for people to look at: a JPEG of at most so many pixels, of what the encoder sees.

    A file of at most 4 KB that browsers show the same is kept as it is. Raises PictureError as `Preprocessor` does.
    """
    with _open(data) as image:
        if len(data) <= KEPT_BYTES and _shown_the_same(image):
            return data
        image.draft("RGB", (longer_side, longer_side))  # a JPEG is decoded at a fraction of its size
        small = upright_rgb(image)
        small.thumbnail((longer_side, longer_side))
        file = BytesIO()
        small.save(file, "JPEG", quality=70)
        return file.getvalue()


def _shown_the_same(image: Image.Image) -> bool:
    """Whether a browser shows what the encoder sees: it moves, puts transparency on the page and may not turn."""
    return (
        image.format in _SHOWN
        and image.mode in {"1", "L", "P", "RGB"}
        and not has_transparency(image)
        and not getattr(image, "is_animated", False)
        and upright_turn(image) is None
    )


class Preprocessor:
    """Upright RGB, and the checkpoint's resize, rescale and normalise, always by Pillow: other backends differ.

    A uint8 pixel has only 256 values a channel, so rescale and normalise are looked up in a table that the
    processor itself has filled. Its own call does float arithmetic on each pixel, for the same bits.
    """

    size: tuple[int, int]  # (H, W)

    def __init__(self, checkpoint_folder: Path):
        """Raises `PipelineError` for a processor that does other steps than these, or has no fixed size."""
        self.processor = load_image_processor(checkpoint_folder)
        self.size = _check_processor(self.processor, checkpoint_folder)
        self._resample = Image.Resampling(int(self.processor.resample))
        self._table = _pixel_table(self.processor)

    def __call__(self, data: bytes) -> np.ndarray:
        """Pixel values (3, H, W), float32, of a picture file's bytes; of an animation its first frame.

        Raises:
            PictureError: the reasons of `check_header`, or the decoder's.
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
            raise PictureUnreachableError(_NO_MEMORY) from None
        except Exception as error:  # a broken file raises anything: OSError, SyntaxError, struct.error, ...
            raise ImageError(f"cannot be decoded: {_one_line(error)}") from None

    def _pixel_values(self, image: Image.Image) -> np.ndarray:
        height, width = self.size
        pixels = np.asarray(upright_rgb(image).resize((width, height), self._resample))
        values = np.empty((3, height, width), np.float32)
        for channel in range(3):
            # "clip" never happens with uint8; the default mode would buffer the output.
            np.take(self._table[channel], pixels[..., channel], out=values[channel], mode="clip")
        return values

    def identity(self) -> str:
        """All that decides the pixels, as canonical JSON."""
        names = ("size", "resample", "do_resize", "do_rescale", "rescale_factor", "do_normalize", "do_convert_rgb")
        settings = {name: getattr(self.processor, name) for name in (*names, "image_mean", "image_std")}
        settings["resample"] = int(settings["resample"])
        settings["size"] = {side: settings["size"][side] for side in ("height", "width")}
        return json.dumps(settings | RULES | {"backend": "pil"}, sort_keys=True)


def _check_processor(processor: Any, folder: Path) -> tuple[int, int]:
    """The processor's (H, W), if it does exactly the steps of `Preprocessor`."""
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
        raise PipelineError(f"{folder}: the image processor's resample is {processor.resample!r}, none of Pillow's")
    return int(size["height"]), int(size["width"])


def _pixel_table(processor: Any) -> np.ndarray:
    """What the processor makes of each uint8 value: (3, 256) float32."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)  # an image 256 wide and 1 high
    values = processor(Image.fromarray(ramp), do_resize=False, return_tensors="np")["pixel_values"]
    return np.ascontiguousarray(values[0].reshape(3, 256), np.float32)


def _check_regular(found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise ImageError(_REASONS[errno.EISDIR])
    if not stat.S_ISREG(found.st_mode):
        raise ImageError("not a regular file")
    if found.st_size > MOST_BYTES:
        raise ImageError(f"too large ({found.st_size} bytes, at most {MOST_BYTES})")


@contextmanager
def _open(data: bytes) -> Iterator[Image.Image]:
    """The picture, not decoded yet; errors of Pillow, here or in the body, become a `ImageError`."""
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
        raise ImageError(why_not_known(data)) from None
    except Image.DecompressionBombError as error:
        pixels = ", at most ".join(re.findall(r"\d+", str(error)))
        raise ImageError(f"too many pixels ({pixels})") from None
    except MemoryError:
        raise PictureUnreachableError(_NO_MEMORY) from None
    except Exception as error:  # a broken file raises anything: OSError, SyntaxError, struct.error, ...
        raise ImageError(unreadable_image(data) or f"cannot be decoded: {_one_line(error)}") from None


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
