"""Identify files that Pillow cannot read by their first bytes, and suggest what to do."""

import zlib

from PIL import Image

_CONVERT = "convert it to JPEG or PNG, e.g. with ImageMagick"

CAMERA_RAW = f"a camera's raw image, of which Pillow reads only a small preview: {_CONVERT}"

_IMAGES = (  # offset, bytes, description
    (0, b"\xff\x0a", "a JPEG XL image"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (0, b"II\xbc\x01", "a JPEG XR image"),
    (0, b"v/1\x01", "an OpenEXR image"),
    (0, b"#?R", "a Radiance HDR image"),
    (0, b"8BPS\0\x02", "a large Photoshop (PSB) image"),
    (0, b"gimp xcf", "a GIMP (XCF) image"),
    (0, b"AT&TFORM", "a DjVu image"),
    (0, b"\xd7\xcd\xc6\x9a", "a Windows metafile (WMF)"),
    (40, b" EMF", "a Windows metafile (EMF)"),
    (0, b"FUJIFILMCCD-RAW", "a camera's raw image (RAF)"),
    (0, b"IIU\0", "a camera's raw image (RW2)"),
    (0, b"IIR", "a camera's raw image (ORF)"),
    (0, b"MMOR", "a camera's raw image (ORF)"),
    (0, b"FOVb", "a camera's raw image (X3F)"),
    (6, b"HEAPCCDR", "a camera's raw image (CRW)"),
    (8, b"CR\x02", "a camera's raw image (CR2)"),
    (128, b"DICM", "a DICOM image"),
)
_NIFTI = "a NIfTI volume (export its slices as PNG)"
_OTHERS = (
    (344, b"n+1\0", _NIFTI),
    (344, b"ni1\0", _NIFTI),
    (4, b"n+2\0\r\n\x1a\n", _NIFTI),
    (0, b"\x93NUMPY", "a NumPy array (.npy)"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"GRIB", "a GRIB file"),
    (0, b"BUFR", "a BUFR file"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"Rar!", "a RAR archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"PAR1", "a Parquet file"),
    (0, b"\0\0\x01\xb3", "an MPEG video"),
    (0, b"\0\0\x01\xba", "an MPEG video"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (8, b"AVI ", "an AVI video"),
)
_TEXTS = {
    b"<!doctype html": "HTML",
    b"<html": "HTML",
    b"<head": "HTML",
    b"<svg": "SVG",
    b"<?xml": "XML",
    b"{": "JSON",
    b"%pdf": "PDF",
    b"%!ps": "PostScript",
    b"version https://git-lfs": "a Git LFS pointer whose file was not downloaded",
}
_IN_PART = (  # formats that Pillow reads only in part
    ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "TIFF", "such as a camera's raw file, float RGB or 64-bit pixels"),
    ((b"\xff\xd8\xff",), "JPEG", "such as one of 12 bits, or lossless"),
)
_AVIF = {b"avif", b"avis"}
_BRANDS = {  # of the ISO container that starts with `ftyp`; the first one in the file is used
    "a HEIC image": {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"},
    "a HEIF image": {b"mif1", b"mif2", b"msf1"},
    "a camera's raw image (CR3)": {b"crx "},
}


def describe_unknown_file(data: bytes) -> str:
    """Return, in one line, why Pillow cannot identify a file, and what to do."""
    if data[4:8] == b"ftyp":
        return _describe_container(data)
    if image := describe_unreadable_image(data):
        return image
    for beginnings, image, kinds in _IN_PART:
        if data.startswith(beginnings):
            return f"a {image} image that Pillow cannot read ({kinds}), or its header is damaged: {_CONVERT}"
    if kind := _gzipped(data) or _find(_OTHERS, data) or _text(data):
        return f"not an image: it looks like {kind}"
    if not any(data):
        return "not an image: all bytes are zero"
    return "not an image: unknown format, or a damaged header"


def describe_unreadable_image(data: bytes) -> str | None:
    """Return the same for known image formats that Pillow cannot decode, even if it misidentifies their header."""
    image = _find(_IMAGES, data)
    return f"{image}, which Pillow cannot read: {_CONVERT}" if image else None


def _describe_container(data: bytes) -> str:
    box = data[: min(int.from_bytes(data[:4], "big"), 4096)]
    named = {data[8:12], *(box[start : start + 4] for start in range(16, len(box), 4))}
    if named & _AVIF:
        if "AVIF" in Image.SAVE:  # a Pillow that writes AVIF also reads it
            return "cannot be decoded: an AVIF image whose header is damaged"
        return f"an AVIF image, which Pillow reads from version 11.3 on: update Pillow, or {_CONVERT}"
    for image, brands in _BRANDS.items():
        if named & brands:
            return f"{image}, which Pillow cannot read: {_CONVERT}"
    return "not an image: it looks like an MP4 or QuickTime video"


def _gzipped(data: bytes) -> str | None:
    if not data.startswith(b"\x1f\x8b"):
        return None
    try:
        inside = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(data, 512)
    except zlib.error:
        return None
    kind = _find(_IMAGES + _OTHERS, inside)
    return f"{kind} in gzip" if kind else None


def _find(kinds: tuple[tuple[int, bytes, str], ...], data: bytes) -> str | None:
    return next((kind for offset, magic, kind in kinds if data.startswith(magic, offset)), None)


def _text(data: bytes) -> str | None:
    start = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith(b"<?xml") and b"<svg" in start:
        return "SVG"
    return next((kind for beginning, kind in _TEXTS.items() if start.startswith(beginning)), None)
