"""Images of every kind: exactly the pixels of the plain recipe, or the reason why they are invalid."""

import gzip
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFilter, features
from transformers import BlipImageProcessorPil
from transformers.image_utils import load_image

from cache.spec import CacheError
from pipeline.commands.precompute import estimate_precompute, precompute
from pipeline.commands.train import train_run
from pipeline.common.errors import PipelineError
from pipeline.config import load_config
from pipeline.encoding.decoding import RULES
from pipeline.encoding.images import ImageError, Preprocessor, check_header, image_digest, read_image_bytes
from pipeline.runs.run import Run

MODES = {  # of the formats with many modes
    "TIFF": "1 L LA P RGB RGBA CMYK YCbCr LAB",
    "PNG": "1 L LA P RGB RGBA",
    "JPEG": "1 L RGB CMYK YCbCr",
}


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Return blurred noise, uint8 (H, W, channels), sensitive to resizing."""
    values = np.random.default_rng([height, width, channels]).integers(0, 256, (height, width, channels), np.uint8)
    planes = [Image.fromarray(values[..., c]).filter(ImageFilter.GaussianBlur(1)) for c in range(channels)]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def photo(height: int = 60, width: int = 80) -> Image.Image:
    return Image.fromarray(noise(height, width))


def with_alpha(height: int = 60, width: int = 80) -> Image.Image:
    return Image.fromarray(noise(height, width, 4))


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Build an RGB PNG from its header and these chunks."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    parts = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
             for kind, body in (header, *chunks, (b"IEND", b""))]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def plain(folder: Path, path: Path) -> np.ndarray:
    """Apply the plain recipe: a row of `datasets`, passed to the image processor."""
    row = datasets.Image().decode_example({"bytes": path.read_bytes(), "path": None})
    return processed(folder, row)


def processed(folder: Path, image: Image.Image) -> np.ndarray:
    """Apply the image processor to an image; the oldest supported one lacks the white background."""
    processor = BlipImageProcessorPil.from_pretrained(folder)
    transparent = "A" in image.getbands() or "transparency" in image.info
    if transparent and not np.asarray(processor.convert_to_rgb(Image.new("RGBA", (1, 1)))).all():
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    return np.asarray(processor(image, return_tensors="pt")["pixel_values"][0])


@pytest.fixture(scope="module")
def preprocess(checkpoint: Path) -> Preprocessor:
    return Preprocessor(checkpoint)


@pytest.fixture
def changed_processor(checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """Create a checkpoint folder whose image processor has other settings."""

    def make(**settings: object) -> Path:
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        processor = json.loads((checkpoint / "processor_config.json").read_text())["image_processor"]
        (folder / "preprocessor_config.json").write_text(json.dumps(processor | settings))
        return folder

    return make


def assert_as_plain(preprocess: Preprocessor, folder: Path, path: Path) -> None:
    expected = plain(folder, path)
    data = read_image_bytes(path)
    check_header(data)
    values = preprocess(data)
    assert values.dtype == np.float32
    assert values.shape == (3, *preprocess.size)
    assert np.array_equal(values, expected)


def reason(call: Callable[..., object], *args: object) -> str:
    with pytest.raises(ImageError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- exactly the plain recipe's pixels


def frames() -> list[Image.Image]:
    return [photo(), photo().rotate(90), photo().rotate(180)]


def oriented(image: Image.Image, form: str, orientation: int = 6, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, form, exif=exif, **options)


def palette(**options: Any) -> bytes:
    return encode(photo().quantize(16), "PNG", **options)


GOOD: dict[str, Callable[[], bytes]] = {
    "rgb.png": lambda: encode(photo(), "PNG"),
    "rgb.bmp": lambda: encode(photo(), "BMP"),
    "rgb.ppm": lambda: encode(photo(), "PPM"),
    "rgb.tif": lambda: encode(photo(), "TIFF"),
    "lzw.tif": lambda: encode(photo(), "TIFF", compression="tiff_lzw"),
    "rgb.webp": lambda: encode(photo(), "WEBP"),
    "rgb.jpg": lambda: encode(photo(), "JPEG"),
    "a jpeg by its name.jpg": lambda: encode(photo(), "PNG"),
    "no extension": lambda: encode(photo(), "JPEG"),
    "baseline 640x480.jpg": lambda: encode(photo(480, 640), "JPEG", quality=90),
    "progressive 640x480.jpg": lambda: encode(photo(480, 640), "JPEG", quality=90, progressive=True),
    "unsubsampled 640x480.jpg": lambda: encode(photo(480, 640), "JPEG", quality=90, subsampling=0),
    "cmyk.jpg": lambda: encode(photo().convert("CMYK"), "JPEG"),
    "gray.jpg": lambda: encode(photo().convert("L"), "JPEG"),
    "rotated by exif.jpg": lambda: oriented(photo(), "JPEG"),
    "gray.png": lambda: encode(photo().convert("L"), "PNG"),
    "1-bit.png": lambda: encode(photo().convert("1"), "PNG"),
    "gray with alpha.png": lambda: encode(with_alpha().convert("LA"), "PNG"),
    "rgb with alpha.png": lambda: encode(with_alpha(), "PNG"),
    "rgb with alpha.webp": lambda: encode(with_alpha(), "WEBP", lossless=True),
    "all transparent.png": lambda: encode(Image.new("RGBA", (9, 9), (1, 2, 3, 0)), "PNG"),
    "palette.png": palette,
    "palette with a transparent color.png": lambda: palette(transparency=3),
    "palette with alpha.png": lambda: palette(transparency=bytes(range(0, 256, 16))),
    "rgb with a transparent color.png": lambda: encode(photo(), "PNG", transparency=(1, 2, 3)),
    "gray with a transparent color.png": lambda: encode(photo().convert("L"), "PNG", transparency=100),
    "still.gif": lambda: encode(photo(), "GIF"),
    "transparent.gif": lambda: encode(photo().quantize(16), "GIF", transparency=2),
    "animated.gif": lambda: encode(frames()[0], "GIF", save_all=True, append_images=frames()[1:]),
    "animated.png": lambda: encode(frames()[0], "PNG", save_all=True, append_images=frames()[1:]),
    "animated.webp": lambda: encode(frames()[0], "WEBP", save_all=True, append_images=frames()[1:]),
    "rows missing.png": lambda: png(8, 8, (b"IDAT", zlib.compress(b"\0" + bytes(range(24))))),
    "1 x 1.png": lambda: encode(photo(1, 1), "PNG"),
    "1 x 500.png": lambda: encode(photo(1, 500), "PNG"),
    "500 x 1.png": lambda: encode(photo(500, 1), "PNG"),
    "3 x 3.png": lambda: encode(photo(3, 3), "PNG"),
    "3 x 100.png": lambda: encode(photo(3, 100), "PNG"),
    "4 x 1.png": lambda: encode(photo(4, 1), "PNG"),
    "1 x 4.png": lambda: encode(photo(1, 4), "PNG"),
    "4 x 4 with alpha.png": lambda: encode(with_alpha(4, 4), "PNG"),
    "already the size.png": lambda: encode(photo(64, 64), "PNG"),
    "größe 大きさ размер مقاس 🙂.jpg": lambda: encode(photo(), "JPEG"),
    " leading space\tand\nnewline.png": lambda: encode(photo(), "PNG"),
}


@pytest.mark.parametrize("name", GOOD)
def test_pixels_equal_the_plain_recipe_bit_for_bit(
    tmp_path: Path, checkpoint: Path, preprocess: Preprocessor, name: str
) -> None:
    if name.endswith(".webp") and not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    path = tmp_path / name
    path.write_bytes(GOOD[name]())
    assert_as_plain(preprocess, checkpoint, path)


@pytest.mark.parametrize(("form", "mode"), [(form, mode) for form in MODES for mode in MODES[form].split()])
def test_each_pillow_mode_equals_the_plain_recipe(
    tmp_path: Path, checkpoint: Path, preprocess: Preprocessor, form: str, mode: str
) -> None:
    path = tmp_path / f"image.{form.lower()}"
    by_way_of = "L" if mode == "LA" else "RGB"  # Pillow converts to this mode only from gray
    path.write_bytes(encode(photo().convert(by_way_of).convert(mode), form))
    try:
        plain(checkpoint, path)
    except Exception:
        assert "cannot be decoded" in reason(preprocess, path.read_bytes())
    else:
        assert_as_plain(preprocess, checkpoint, path)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 48, "width": 96}},
        {"resample": 2, "size": {"height": 224, "width": 224}},
        {"resample": 0},
        {"resample": 1},
        {"image_mean": [0.5, 0.25, 0.1], "image_std": [0.3, 0.2, 0.7]},
        {"image_mean": 0.5, "image_std": 0.5},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5},
    ],
    ids=str,
)
def test_other_processors_give_their_own_pixels(
    tmp_path: Path, changed_processor: Callable[..., Path], settings: dict[str, object]
) -> None:
    folder = changed_processor(**settings)
    preprocess = Preprocessor(folder)
    processor = BlipImageProcessorPil.from_pretrained(folder)
    for name in settings.keys() - {"size"}:
        assert getattr(processor, name) == pytest.approx(settings[name])
    path = tmp_path / "image.png"
    for image in photo(), with_alpha(), photo(3, 3), photo(1, 4):
        path.write_bytes(encode(image, "PNG"))
        values = preprocess(path.read_bytes())
        assert values.dtype == np.float32
        assert values.shape == (3, processor.size["height"], processor.size["width"])
        assert np.array_equal(values, plain(folder, path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_resize": False}, "do_resize false"),
        ({"do_convert_rgb": False}, "do_convert_rgb false"),
        ({"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}, "do_center_crop true"),
        ({"do_pad": True}, "do_pad true"),
        ({"size": {"shortest_edge": 64}}, "not a height and a width"),
        ({"resample": 17}, "resample is 17"),
        ({"resample": None}, "resample is None"),
    ],
)
def test_processor_with_other_steps_raises(
    changed_processor: Callable[..., Path], settings: dict[str, object], message: str
) -> None:
    folder = changed_processor(**settings)
    with pytest.raises(PipelineError, match=message) as caught:
        Preprocessor(folder)
    assert str(folder) in str(caught.value)


def test_settings_json_is_independent_of_the_file(checkpoint: Path, changed_processor: Callable[..., Path]) -> None:
    settings = Preprocessor(checkpoint).settings_json()
    assert json.loads(settings)["size"] == {"height": 64, "width": 64}
    assert Preprocessor(changed_processor()).settings_json() == settings


def test_cache_with_other_decoding_rules_raises(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache made before orientation, transparency and depth were settings is rejected."""
    config = load_config(data_set / "config.yaml")
    settings = Preprocessor.settings_json
    with monkeypatch.context() as patch:
        patch.setattr(
            Preprocessor,
            "settings_json",
            lambda self: json.dumps(
                {key: value for key, value in json.loads(settings(self)).items() if key not in RULES}
            ),
        )
        precompute(config)
    before = {path: path.read_bytes() for path in (data_set / "cache").iterdir()}
    for stage in precompute, lambda config: train_run(config, Run(data_set / "run")):
        with pytest.raises((CacheError, PipelineError)) as caught:
            stage(config)
        for words in 'exif_orientation: cache has nothing, wanted "upright"', "transparency: ", "more_than_8_bits: ":
            assert words in str(caught.value)
    assert {path: path.read_bytes() for path in (data_set / "cache").iterdir()} == before


def test_deep_images_are_logged_once(data_set: Path, capfd: pytest.CaptureFixture[str]) -> None:
    deep = encode(Image.fromarray(depth(0, 4095).astype(np.uint16)), "PNG")
    floats = encode(Image.fromarray(depth(0, 1).astype(np.float32)), "TIFF")
    for number, data in enumerate([deep, deep, floats]):  # two files of the same image
        (data_set / "images" / f"{number}.png").write_bytes(data)
    config = load_config(data_set / "config.yaml")
    line = rf"2 images have .* float pixels \(first: {data_set}/images/[01].png\); each is scaled to its own range"
    for run in estimate_precompute, precompute, precompute:  # the last one encodes nothing
        assert run(config).rescaled_images == 2
        log = capfd.readouterr().err
        assert len(re.findall(line, log)) == log.count("scaled to its own range") == 1


def test_settings_json_changes_with_a_setting(checkpoint: Path, changed_processor: Callable[..., Path]) -> None:
    assert Preprocessor(changed_processor(resample=2)).settings_json() != Preprocessor(checkpoint).settings_json()


def test_preprocessing_is_thread_safe(preprocess: Preprocessor) -> None:
    images = [GOOD[name]() for name in ("rgb.jpg", "palette with alpha.png", "animated.gif", "rgb with alpha.png")]
    expected = [preprocess(data) for data in images]
    with ThreadPoolExecutor(8) as pool:
        for index, values in enumerate(pool.map(preprocess, images * 25)):
            assert np.array_equal(values, expected[index % len(images)])


# ---- turned upright


def turned_by_xmp() -> bytes:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    segment = b"http://ns.adobe.com/xap/1.0/\0" + xmp
    start, rest = encode(photo(), "JPEG")[:2], encode(photo(), "JPEG")[2:]
    return start + b"\xff\xe1" + struct.pack(">H", 2 + len(segment)) + segment + rest


TURNED: dict[str, Callable[[int], bytes]] = {
    "photo.jpg": lambda orientation: oriented(photo(), "JPEG", orientation),
    "gray.jpg": lambda orientation: oriented(photo().convert("L"), "JPEG", orientation),
    "cmyk.jpg": lambda orientation: oriented(photo().convert("CMYK"), "JPEG", orientation),
    "stereo.mpo": lambda orientation: oriented(
        photo(), "MPO", orientation, save_all=True, append_images=[photo().rotate(180)]
    ),
    "photo.png": lambda orientation: oriented(photo(), "PNG", orientation),
    "with alpha.png": lambda orientation: oriented(with_alpha(), "PNG", orientation),
    "palette.png": lambda orientation: oriented(photo().quantize(16), "PNG", orientation, transparency=3),
    "photo.tif": lambda orientation: oriented(photo(), "TIFF", orientation),
    "lzw.tif": lambda orientation: oriented(photo(), "TIFF", orientation, compression="tiff_lzw"),
    "pages.tif": lambda orientation: oriented(
        photo(), "TIFF", orientation, save_all=True, append_images=[photo().rotate(180)]
    ),
    "photo.webp": lambda orientation: oriented(photo(), "WEBP", orientation, lossless=True),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", TURNED)
def test_exif_orientation_equals_the_plain_recipe(
    tmp_path: Path, checkpoint: Path, preprocess: Preprocessor, name: str, orientation: int
) -> None:
    path = tmp_path / name
    path.write_bytes(TURNED[name](orientation))
    with Image.open(path) as image:
        as_stored = processed(checkpoint, image)
    values = preprocess(path.read_bytes())
    assert np.array_equal(values, plain(checkpoint, path))
    if name not in ("with alpha.png", "palette.png"):  # load_image drops transparency
        assert np.array_equal(values, processed(checkpoint, load_image(str(path))))
    # Pillow turns a TIFF itself.
    assert np.array_equal(values, as_stored) == (orientation == 1 or name.endswith(".tif"))


def test_rotated_photo_is_turned_upright(preprocess: Preprocessor) -> None:
    upright = preprocess(encode(photo(), "PNG"))
    sideways = oriented(photo().transpose(Image.Transpose.ROTATE_90), "PNG", 6)  # a quarter turn back to the right
    assert np.array_equal(preprocess(sideways), upright)


def test_xmp_or_invalid_orientation_equals_the_plain_recipe(
    tmp_path: Path, checkpoint: Path, preprocess: Preprocessor
) -> None:
    for data in turned_by_xmp(), oriented(photo(), "JPEG", 0), oriented(photo(), "JPEG", 9):
        (tmp_path / "photo.jpg").write_bytes(data)
        assert_as_plain(preprocess, checkpoint, tmp_path / "photo.jpg")


@pytest.mark.parametrize("exif", [b"Exif\0\0no TIFF header", b"Exif\0\0II*\0", b"Exif\0\0II*\0\xff\xff\xff\xff\1"])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_damaged_exif_is_ignored(preprocess: Preprocessor, form: str, exif: bytes) -> None:
    damaged = encode(photo(), form, exif=exif)
    check_header(damaged)
    assert np.array_equal(preprocess(damaged), preprocess(encode(photo(), form)))


# ---- more than 8 bits


def tiff(
    bits: int, sample_format: int, width: int, height: int, pixels: bytes, photometric: int = 1, **more: int
) -> bytes:
    """Build a TIFF with one channel: Pillow writes few of the kinds that it reads. `more`: tags by name."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: height,
            279: len(pixels), 339: sample_format}  # fmt: skip
    tags |= {ExifTags.Base[name].value: value for name, value in more.items()}
    tags[273] = 8 + 2 + 12 * len(tags) + 4  # where the pixels start
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + pixels


def depth(low: float, high: float) -> np.ndarray:
    """Return (60, 80) float64 values from `low` to `high`, both inclusive."""
    values = noise(60, 80, 1)[..., 0].astype(np.float64)
    return low + (high - low) * (values - values.min()) / (values.max() - values.min())


def packed_12_bits(values: np.ndarray) -> bytes:
    bits = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)[:, 4:]
    return np.packbits(bits).tobytes()


def pgm(values: np.ndarray) -> bytes:
    return f"P5 {values.shape[1]} {values.shape[0]} 65535\n".encode() + values.astype(">u2").tobytes()


DEEP: dict[str, tuple[Callable[[np.ndarray], bytes], str, tuple[float, float]]] = {  # file, kind, range of values
    "16-bit.png": (lambda v: encode(Image.fromarray(v), "PNG"), "u2", (0, 65535)),
    "12 of 16 bits.png": (lambda v: encode(Image.fromarray(v), "PNG"), "u2", (100, 4000)),
    "8 of 16 bits.png": (lambda v: encode(Image.fromarray(v), "PNG"), "u2", (3, 90)),
    "16-bit.tif": (lambda v: encode(Image.fromarray(v), "TIFF"), "u2", (900, 50000)),
    "lzw 16-bit.tif": (lambda v: encode(Image.fromarray(v), "TIFF", compression="tiff_lzw"), "u2", (900, 50000)),
    "big-endian.tif": (lambda v: encode(Image.fromarray(v), "TIFF"), ">u2", (900, 50000)),
    "12-bit.tif": (lambda v: tiff(12, 1, 80, 60, packed_12_bits(v)), "u2", (5, 4095)),
    "signed 16-bit.tif": (lambda v: tiff(16, 2, 80, 60, v.tobytes()), "i2", (-1024, 3071)),
    "signed 32-bit.tif": (lambda v: encode(Image.fromarray(v), "TIFF"), "i4", (-(2**31), 2**31 - 1)),
    "unsigned 32-bit.tif": (lambda v: tiff(32, 1, 80, 60, v.tobytes()), "u4", (0, 2**32 - 1)),
    "16-bit.pgm": (pgm, "u2", (300, 60000)),
    "float of 0 to 1.tif": (lambda v: encode(Image.fromarray(v), "TIFF"), "f4", (0, 1)),
    "float of 0 to 255.tif": (lambda v: encode(Image.fromarray(v), "TIFF"), "f4", (0, 255)),
    "float of all sizes.tif": (lambda v: encode(Image.fromarray(v), "TIFF"), "f4", (-3e38, 3e38)),
    "tiny float.tif": (lambda v: encode(Image.fromarray(v), "TIFF"), "f4", (1e-30, 5e-30)),
}


def in_8_bits(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return np.rint((values - values.min()) * (255 / (values.max() - values.min()))).astype(np.uint8)


@pytest.mark.parametrize("name", DEEP)
def test_deep_image_is_scaled_to_its_own_range(preprocess: Preprocessor, name: str) -> None:
    write, kind, (low, high) = DEEP[name]
    values = np.clip(np.rint(depth(low, high)) if "f" not in kind else depth(low, high), low, high).astype(kind)
    data = write(values)
    assert check_header(data)
    assert np.array_equal(preprocess(data), preprocess(encode(Image.fromarray(in_8_bits(values)), "PNG")))


def seen(preprocess: Preprocessor, data: bytes) -> np.ndarray:
    """Return the first channel of what the encoder sees, before normalization: (H, W) uint8."""
    processor = preprocess.processor
    return np.rint((preprocess(data)[0] * processor.image_std[0] + processor.image_mean[0]) * 255).astype(np.uint8)


def halves(left: float, right: float, kind: str = "f4") -> np.ndarray:
    return np.repeat(np.array([[left] * 32 + [right] * 32], kind), 64, axis=0)


@pytest.mark.parametrize(
    ("values", "black_and_white"),
    [
        (halves(7, 7, "u2"), (0, 0)),
        (halves(0.5, 0.5), (0, 0)),
        (halves(np.nan, np.nan), (0, 0)),
        (halves(np.inf, np.inf), (0, 0)),
        (np.where(np.arange(64) < 16, halves(np.nan, 9), halves(2, 9)), (0, 255)),
        (np.where(np.arange(64) < 16, halves(-np.inf, 9), halves(2, 9)), (0, 255)),
        (np.where(np.arange(64) > 48, halves(2, np.inf), halves(2, 9)), (0, 255)),
    ],
)
def test_constant_images_and_nonfinite_values(
    preprocess: Preprocessor, values: np.ndarray, black_and_white: tuple[int, int]
) -> None:
    pixels = seen(preprocess, encode(Image.fromarray(values), "TIFF"))
    assert (pixels[:, :30] == black_and_white[0]).all()
    assert (pixels[:, 34:] == black_and_white[1]).all()


def test_16_bits_with_transparency_or_white_as_zero(preprocess: Preprocessor) -> None:
    values = halves(1000, 2000, "u2")
    values[:, :8] = 60000
    pixels = seen(preprocess, encode(Image.fromarray(values), "PNG", transparency=60000))
    assert pixels[5, [2, 20, 50]].tolist() == [255, 0, 255]
    values = halves(1000, 2000, "u2")
    assert seen(preprocess, tiff(16, 1, 64, 64, values.tobytes(), photometric=0))[5, [2, 50]].tolist() == [255, 0]


def test_deep_image_is_turned_upright(preprocess: Preprocessor) -> None:
    image = Image.fromarray(depth(0, 40000).astype(np.uint16))
    turned = Image.fromarray(np.rot90(np.asarray(image)).copy())
    assert np.array_equal(preprocess(oriented(turned, "PNG", 6)), preprocess(encode(image, "PNG")))


def test_header_shows_whether_an_image_is_scaled() -> None:
    assert not any(check_header(make()) for name, make in GOOD.items() if not name.endswith(".webp"))


# ---- invalid images


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def ftyp(*brands: bytes) -> bytes:
    """Return only the first box of an ISO container."""
    named = brands[0] + bytes(4) + b"".join(brands[1:])
    return struct.pack(">I", 8 + len(named)) + b"ftyp" + named


def nifti() -> bytes:
    return struct.pack("<I", 348) + bytes(340) + b"n+1\0" + bytes(100)


def saved_array() -> bytes:
    buffer = BytesIO()
    np.save(buffer, np.zeros((2, 2)))
    return buffer.getvalue()


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "truncated.jpg": (lambda: cut(encode(photo(), "JPEG"), 0.7), "cannot be decoded: image file is truncated"),
    "truncated.png": (lambda: cut(encode(photo(), "PNG"), 0.7), "cannot be decoded: "),
    "truncated.gif": (lambda: cut(encode(photo(), "GIF"), 0.7), "cannot be decoded: image file is truncated"),
    "damaged.png": (lambda: png(8, 8, (b"IDAT", b"not what zlib makes")), "cannot be decoded: "),
    "header cut.jpg": (lambda: encode(photo(), "JPEG")[:100], "cannot be decoded: Truncated File Read"),
    "header cut.png": (lambda: encode(photo(), "PNG")[:20], "cannot be decoded: Truncated File Read"),
    "empty.jpg": (lambda: b"", "empty file"),
    "html.jpg": (lambda: b"\n <!DOCTYPE html>\n<title>404</title>", "not an image: it looks like HTML"),
    "html with a byte order mark.jpg": (lambda: b"\xef\xbb\xbf<html>", "not an image: it looks like HTML"),
    "drawing.svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image: it looks like SVG"),
    "lfs.jpg": (lambda: b"version https://git-lfs.github.com/spec/v1\noid", "not an image: it looks like a Git LFS"),
    "zeros.jpg": (lambda: bytes(5000), "not an image: all bytes are zero"),
    "archive.gz": (lambda: gzip.compress(b"anything"), "not an image: it looks like a gzip archive"),
    "damaged archive.gz": (lambda: b"\x1f\x8bno more", "not an image: it looks like a gzip archive"),
    "error.jpg": (lambda: b'{"error": "not found"}', "not an image: it looks like JSON"),
    "drawing with a header.svg": (
        lambda: b'<?xml version="1.0"?><!DOCTYPE svg><svg/>',
        "not an image: it looks like SVG",
    ),
    "array.npy": (lambda: saved_array(), "not an image: it looks like a NumPy array"),
    "clip.mp4": (lambda: ftyp(b"isom", b"iso2", b"mp41"), "not an image: it looks like an MP4 or QuickTime video"),
    "clip.mpg": (lambda: b"\0\0\x01\xb3\x16\0\xf0\x15", "not an image: it looks like an MPEG video"),
    "clip.webm": (lambda: b"\x1aE\xdf\xa3" + bytes(40), "not an image: it looks like a Matroska or WebM video"),
    "clip.avi": (lambda: b"RIFF\0\1\0\0AVI LIST", "not an image: it looks like an AVI video"),
    "weather.grib": (lambda: b"GRIB\0\0\x50\x01", "not an image: it looks like a GRIB file"),
    "weather.bufr": (lambda: b"BUFR\0\0\x50\x04", "not an image: it looks like a BUFR file"),
    "features.h5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(90), "not an image: it looks like an HDF5 file"),
    "rows.parquet": (lambda: b"PAR1\x15\x04", "not an image: it looks like a Parquet file"),
    "iphone.heic": (lambda: ftyp(b"heic", b"mif1", b"heic"), "a HEIC image, which Pillow cannot read: convert it to"),
    "by its brands.heic": (lambda: ftyp(b"mif1", b"mif1", b"heic"), "a HEIC image, which Pillow cannot read: "),
    "ten bits.heic": (lambda: ftyp(b"heix", b"mif1"), "a HEIC image, which Pillow cannot read: "),
    "other.heif": (lambda: ftyp(b"mif1", b"miaf"), "a HEIF image, which Pillow cannot read: "),
    "canon.cr3": (lambda: ftyp(b"crx ", b"isom"), "a camera's raw image (CR3), which Pillow cannot read: "),
    "canon.cr2": (lambda: b"II*\0\x10\0\0\0CR\x02\0" + bytes(60), "a camera's raw image (CR2), which Pillow"),
    "fuji.raf": (lambda: b"FUJIFILMCCD-RAW 0201", "a camera's raw image (RAF), which Pillow cannot read: "),
    "olympus.orf": (lambda: b"IIRO\x08\0\0\0", "a camera's raw image (ORF), which Pillow cannot read: "),
    "panasonic.rw2": (lambda: b"IIU\0\x18\0\0\0", "a camera's raw image (RW2), which Pillow cannot read: "),
    "bare.jxl": (lambda: b"\xff\x0a" + bytes(20), "a JPEG XL image, which Pillow cannot read: convert it to"),
    "boxed.jxl": (lambda: b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20), "a JPEG XL image, which Pillow cannot read: "),
    "scan.dcm": (lambda: bytes(128) + b"DICM\x02\0", "a DICOM image, which Pillow cannot read: convert it to"),
    "scan.nii": (lambda: nifti(), "not an image: it looks like a NIfTI volume (export its slices"),
    "scan.nii.gz": (lambda: gzip.compress(nifti()), "not an image: it looks like a NIfTI volume (export its slices"),
    "light.exr": (lambda: b"v/1\x01\2\0\0\0", "an OpenEXR image, which Pillow cannot read: "),
    "light.hdr": (lambda: b"#?RADIANCE\n", "a Radiance HDR image, which Pillow cannot read: "),
    "drawing.wmf": (lambda: b"\xd7\xcd\xc6\x9a\0\0" + bytes(40), "a Windows metafile (WMF), which Pillow cannot"),
    "12-bit.jpg": (
        lambda: encode(photo(), "JPEG").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"),
        "a JPEG image that Pillow cannot read (such as one of 12 bits, or lossless), or its header",
    ),
    "float rgb.tif": (lambda: tiff(64, 3, 2, 2, bytes(32)), "a TIFF image that Pillow cannot read (such as"),
    "text.jpg": (lambda: b"no image at all", "not an image: unknown format"),
    "bomb.png": (lambda: png(20000, 20000, (b"IDAT", b"")), "too many pixels (400000000, at most 178956970)"),
    "no width.png": (lambda: png(0, 5, (b"IDAT", zlib.compress(b"\0" * 5))), "not an image: unknown format"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_invalid_image_error_gives_the_reason(
    tmp_path: Path, checkpoint: Path, preprocess: Preprocessor, name: str
) -> None:
    make, message = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(make())
    with pytest.raises(Exception):  # noqa: B017, PT011 - it raises anything
        plain(checkpoint, path)
    assert reason(preprocess, read_image_bytes(path)).startswith(message)


@pytest.mark.parametrize("name", [name for name in BROKEN if not name.startswith(("truncated", "damaged"))])
def test_header_check_finds_header_problems(name: str) -> None:
    make, message = BROKEN[name]
    assert reason(check_header, make()).startswith(message)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_image_equals_the_plain_recipe_or_fails(
    tmp_path: Path, checkpoint: Path, preprocess: Preprocessor, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    name = ("rgb.jpg", "rgb.png", "animated.gif", "lzw.tif", "rotated by exif.jpg")[seed % 5]
    data = bytearray(GOOD[name]())
    for position in rng.integers(0, len(data), 3):
        data[position] = rng.integers(256)
    path = tmp_path / name
    path.write_bytes(data)
    try:
        expected = plain(checkpoint, path)
    except Exception:
        try:  # only its EXIF may be damaged
            expected = processed(checkpoint, Image.open(path))
        except Exception:
            assert reason(preprocess, bytes(data))
            return
    assert np.array_equal(preprocess(bytes(data)), expected)


def test_raw_preview_is_rejected_and_other_small_images_are_not(preprocess: Preprocessor) -> None:
    for call in check_header, preprocess:
        raw = tiff(8, 1, 160, 120, bytes(160 * 120), NewSubfileType=1, SubIFDs=8)
        assert reason(call, raw).startswith("a camera's raw image, of which Pillow reads only a small preview: convert")
        call(tiff(8, 1, 160, 120, bytes(160 * 120), NewSubfileType=1))
        call(tiff(8, 1, 160, 120, bytes(160 * 120), SubIFDs=8))


def test_avif_is_read_if_pillow_supports_it(preprocess: Preprocessor) -> None:
    damaged = ftyp(b"avif", b"mif1")
    if "AVIF" in Image.SAVE:
        assert preprocess(encode(photo(), "AVIF")).shape == (3, 64, 64)
        assert reason(preprocess, damaged) == "cannot be decoded: an AVIF image whose header is damaged"
    else:
        assert reason(preprocess, damaged).startswith("an AVIF image, which Pillow reads from version 11.3 on: update")


def test_image_above_the_warning_limit_is_decoded(
    tmp_path: Path, checkpoint: Path, preprocess: Preprocessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(encode(photo(60, 80), "PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.warns(Image.DecompressionBombWarning):
        assert_as_plain(preprocess, checkpoint, path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert reason(preprocess, path.read_bytes()) == "too many pixels (4800, at most 4000)"


def test_pillow_warnings_and_logs_are_hidden(tmp_path: Path, checkpoint: Path) -> None:
    corrupt_exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 0x010F, 2, 5000, 60000)
    samples = bytearray(encode(photo(), "TIFF"))
    tag = samples.index(struct.pack("<HHIH", 277, 3, 1, 3))
    samples[tag + 8] = 200  # samples per pixel
    for name, data in {
        "palette.png": palette(transparency=bytes(range(0, 256, 16))),
        "exif.jpg": encode(photo(), "JPEG", exif=corrupt_exif),
        "large.png": encode(photo(), "PNG"),
        "samples.tif": bytes(samples),
    }.items():
        (tmp_path / name).write_bytes(data)
    script = f"""
from pathlib import Path
from PIL import Image
from pipeline.encoding.images import ImageError, Preprocessor
Image.MAX_IMAGE_PIXELS = 3000
preprocess = Preprocessor(Path({str(checkpoint)!r}))
for path in sorted(Path({str(tmp_path)!r}).iterdir()):
    try:
        preprocess(path.read_bytes())
    except ImageError as error:
        print(path.name)
"""
    run = subprocess.run([sys.executable, "-W", "always", "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "samples.tif\n"
    assert "Warning" not in run.stderr
    assert "PIL" not in run.stderr
    assert "samples" not in run.stderr


# ---- files


def test_file_is_read_and_hashed(tmp_path: Path) -> None:
    path, data = tmp_path / "a.bin", os.urandom(300_000)
    path.write_bytes(data)
    (tmp_path / "link").symlink_to(path)
    assert read_image_bytes(path) == read_image_bytes(tmp_path / "link") == data
    assert image_digest(data) == hashlib.sha256(data).digest()


def test_empty_file_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "empty.jpg"
    path.touch()
    assert read_image_bytes(path) == b""


def test_missing_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to("gone.jpg")
    assert reason(read_image_bytes, tmp_path / "gone.jpg") == "not found"
    assert reason(read_image_bytes, tmp_path / "broken") == "not found"
    assert reason(read_image_bytes, tmp_path / "file" / "a.jpg").startswith(
        "not found: a component of its path is a file"
    )


def test_folder_named_like_an_image_is_reported(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").mkdir()
    assert reason(read_image_bytes, tmp_path / "x.jpg") == "a folder, not a file"


def test_link_loop_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to("b.jpg")
    (tmp_path / "b.jpg").symlink_to("a.jpg")
    assert reason(read_image_bytes, tmp_path / "a.jpg") == "symbolic links form a loop"


@pytest.mark.parametrize("name", ["a\0.jpg", "a\ud800.jpg"])
def test_impossible_file_name_is_reported(tmp_path: Path, name: str) -> None:
    assert reason(read_image_bytes, tmp_path / name) == "not found: not a valid file name"


def test_too_long_file_name_is_reported(tmp_path: Path) -> None:
    assert reason(read_image_bytes, tmp_path / ("a" * 300)) == "its name is too long"


def test_pipes_and_devices_are_rejected_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    started = time.perf_counter()
    assert reason(read_image_bytes, tmp_path / "pipe.jpg") == "not a regular file"
    assert reason(read_image_bytes, Path("/dev/zero")) == "not a regular file"
    assert time.perf_counter() - started < 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.touch(mode=0o000)
    assert reason(read_image_bytes, path) == "permission denied"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
def test_files_are_closed(tmp_path: Path, preprocess: Preprocessor) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "html.jpg").write_bytes(b"<html>")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        for name in "pipe.jpg", ".":
            reason(read_image_bytes, tmp_path / name)
        reason(preprocess, read_image_bytes(tmp_path / "html.jpg"))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_huge_file_is_rejected_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(ImageError, match=r"too large \(1099511627776 bytes, at most 1073741824\)"):
        read_image_bytes(path)
