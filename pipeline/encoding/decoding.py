"""Convert decoded images to upright 8-bit RGB, for the encoder and for thumbnails.

Images with 8 bits per channel become what `datasets` and `transformers` make of them, bit for bit: turned upright by
the EXIF orientation, transparency on white. Images with more than 8 bits in one channel (modes `I;16`, `I`) or float
pixels (`F`) differ on purpose: those libraries clip them to 0 to 255, which makes most of them white or black. Here
each is scaled to its own range. Of 16-bit color images Pillow keeps the high bytes, in both cases.
"""

from typing import Any

import numpy as np
from PIL import ExifTags, Image

RULES = {
    "exif_orientation": "upright",
    "transparency": "on white",
    "more_than_8_bits": "scaled to the range of the image",
}
"""Readable description of the rules in this module, a part of the cache's `image_preprocessing`."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Values of TIFF's PhotometricInterpretation, SampleFormat and NewSubfileType.
_WHITE_IS_ZERO, _UNSIGNED, _REDUCED = 0, (1,), 1


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an open image, of an animation its first frame, to upright RGB. It may be `image` itself."""
    image.load()  # before reading the orientation: it may follow the pixels, and Pillow turns a TIFF itself
    turn = upright_turn(image)
    rgb = _rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def is_rescaled(image: Image.Image) -> bool:
    """Return, from the header alone, whether `upright_rgb` scales the pixels to their own range."""
    return image.mode.startswith(("I", "F"))


def is_preview(image: Image.Image) -> bool:
    """Return whether this is the preview in a camera's raw file (DNG, NEF), which is all that Pillow reads of it."""
    tags = getattr(image, "tag_v2", {})
    return tags.get(ExifTags.Base.NewSubfileType) == _REDUCED and ExifTags.Base.SubIFDs in tags


def has_transparency(image: Image.Image) -> bool:
    """Return whether an image has an alpha channel or a transparent color."""
    return "A" in image.getbands() or image.info.get("transparency") is not None


def upright_turn(image: Image.Image) -> Image.Transpose | None:
    """Return the transpose that turns an image upright by its EXIF orientation; None if upright or damaged."""
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises anything for damaged EXIF, while the pixels are good
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if is_rescaled(image):
        return Image.fromarray(_scaled(image)).convert("RGB")
    if has_transparency(image):  # as transformers does; 5.17 dropped the alpha channel
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled(image: Image.Image) -> np.ndarray:
    """Scale one channel so that its minimum becomes 0 and its maximum 255: (H, W) uint8.

    Non-finite values are not counted: NaN and -inf become 0, inf 255. A constant image becomes 0.
    """
    tiff_tags: Any = getattr(image, "tag_v2", {})
    stored = np.asarray(image)
    if image.mode == "I" and tiff_tags and tiff_tags.get(ExifTags.Base.SampleFormat, _UNSIGNED) == _UNSIGNED:
        stored = stored.view(np.uint32)  # Pillow has only int32, and wraps the upper half
    transparent = np.equal(stored, image.info.get("transparency", np.nan))
    counted = stored[np.isfinite(stored) & ~transparent]
    low, high = (float(counted.min()), float(counted.max())) if counted.size else (0.0, 0.0)
    values = np.nan_to_num(stored.astype(np.float64), copy=False, nan=low, posinf=high, neginf=low)
    np.clip(values, low, high, out=values)
    values -= low
    values *= 255 / (high - low) if high > low else 0
    gray = np.rint(values, out=values).astype(np.uint8)
    if tiff_tags.get(ExifTags.Base.PhotometricInterpretation) == _WHITE_IS_ZERO:
        np.subtract(255, gray, out=gray)  # Pillow inverts only 8-bit images
    gray[transparent] = 255
    return gray
