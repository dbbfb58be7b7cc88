"""Thumbnails are created once, reused and updated, and never stop a run."""

import errno
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_set import write_data_set
from PIL import Image, features

import pipeline.encoding.encoding_loop
import pipeline.encoding.thumbnails
from cache import audit
from cache.inventory import remove
from cache.ownership import own_files
from cache.reader import FeatureReader
from cache.spec import CacheError
from cache.thumbnails import Thumbnails, find_thumbnails
from pipeline.commands.cache import cache_info
from pipeline.commands.precompute import precompute
from pipeline.commands.repair import repair
from pipeline.config import load_config
from pipeline.encoding.images import MAX_KEPT_BYTES, ImageError, Preprocessor, image_digest, thumbnail


def encoded_noise(format: str, width: int, height: int, mode: str = "RGB") -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(noise).convert(mode).save(file, format)
    return file.getvalue()


@pytest.mark.parametrize(
    ("format", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "P"), ("BMP", "RGB"), ("TIFF", "L")]
)
def test_thumbnail_keeps_the_aspect_ratio(format: str, mode: str) -> None:
    with Image.open(BytesIO(thumbnail(encoded_noise(format, 400, 200, mode), 100))) as small:
        assert (small.format, small.mode, small.size) == ("JPEG", "RGB", (100, 50))


def test_small_browser_file_is_its_own_thumbnail() -> None:
    small = encoded_noise("PNG", 20, 20)
    assert len(small) < MAX_KEPT_BYTES
    assert thumbnail(small, 10) == small
    with Image.open(BytesIO(thumbnail(encoded_noise("BMP", 20, 20), 128))) as made:
        assert (made.format, made.size) == ("JPEG", (20, 20))
    with pytest.raises(ImageError):
        thumbnail(b"no image", 128)


def quarters(size: int, mode: str = "RGB") -> Image.Image:
    """Return an image twice as wide as high: red, green, blue and gray, clockwise from the top left."""
    image = Image.new("RGB", (2 * size, size), (128, 128, 128))
    for place, color in (((0, 0), "red"), ((size, 0), "lime"), ((size, size // 2), "blue")):
        image.paste(color, (*place, place[0] + size, place[1] + size // 2))
    return image.convert(mode)


def saved(image: Image.Image, format: str, orientation: int = 1, **options: Any) -> bytes:
    exif, file = Image.Exif(), BytesIO()
    exif[0x0112] = orientation
    image.save(file, format, **options, **({"exif": exif} if orientation > 1 else {}))
    return file.getvalue()


def see_through(size: int, mode: str) -> Image.Image:
    """Return `quarters` with a transparent left half, red underneath."""
    image = quarters(size, "RGBA")
    image.paste((255, 0, 0, 0), (0, 0, size, size))
    return image.convert(mode)


def deep(size: int, low: float, high: float, kind: str) -> Image.Image:
    return Image.fromarray(np.linspace(low, high, 2 * size * size).astype(kind).reshape(size, 2 * size))


def page(first: Image.Image, format: str) -> bytes:
    """Return a file with several frames."""
    return saved(first, format, save_all=True, append_images=[first.rotate(180)])


KINDS = {
    **{f"jpeg {turn}": lambda size, turn=turn: saved(quarters(size), "JPEG", turn) for turn in range(1, 9)},
    **{f"png {turn}": lambda size, turn=turn: saved(quarters(size), "PNG", turn) for turn in range(1, 9)},
    "webp turned": lambda size: saved(quarters(size), "WEBP", 6),
    "tiff turned": lambda size: saved(quarters(size), "TIFF", 6),
    "rgba png": lambda size: saved(see_through(size, "RGBA"), "PNG"),
    "rgba png turned": lambda size: saved(see_through(size, "RGBA"), "PNG", 6),
    "la png": lambda size: saved(see_through(size, "LA"), "PNG"),
    "rgba webp": lambda size: saved(see_through(size, "RGBA"), "WEBP", lossless=True),
    "palette png": lambda size: saved(quarters(size).quantize(8), "PNG"),
    "palette png with a transparent color": lambda size: saved(quarters(size).quantize(8), "PNG", transparency=1),
    "rgb png with a transparent color": lambda size: saved(quarters(size), "PNG", transparency=(255, 0, 0)),
    "transparent gif": lambda size: saved(see_through(size, "RGBA"), "GIF"),
    "animated gif": lambda size: page(quarters(size), "GIF"),
    "animated webp": lambda size: page(quarters(size), "WEBP"),
    "pages of a tiff": lambda size: page(quarters(size), "TIFF"),
    "mpo": lambda size: page(quarters(size), "MPO"),
    "cmyk jpeg": lambda size: saved(quarters(size, "CMYK"), "JPEG"),
    "grey jpeg": lambda size: saved(quarters(size, "L"), "JPEG"),
    "1-bit png": lambda size: saved(quarters(size, "1"), "PNG"),
    "16-bit png": lambda size: saved(deep(size, 0, 65535, "u2"), "PNG"),
    "12-bit png": lambda size: saved(deep(size, 0, 4095, "u2"), "PNG"),
    "signed 32-bit tiff": lambda size: saved(deep(size, -1000, 90000, "i4"), "TIFF"),
    "float tiff": lambda size: saved(deep(size, 0, 1, "f4"), "TIFF"),
}


@pytest.mark.parametrize("size", [20, 400])
@pytest.mark.parametrize("kind", KINDS)
def test_thumbnail_shows_what_the_encoder_sees(checkpoint: Path, kind: str, size: int) -> None:
    """In the worst browser: no EXIF orientation, last frame, transparency on black."""
    if "webp" in kind and not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    preprocess = Preprocessor(checkpoint)
    data = KINDS[kind](size)
    with Image.open(BytesIO(thumbnail(data, 128))) as small:
        small.seek(getattr(small, "n_frames", 1) - 1)
        shown = Image.alpha_composite(Image.new("RGBA", small.size, "black"), small.convert("RGBA")).convert("RGB")
    pixels = np.asarray(shown.resize(preprocess.size[::-1], Image.Resampling.BICUBIC), np.float64)
    mean, std = (
        np.array(values)[:, None, None] for values in (preprocess.processor.image_mean, preprocess.processor.image_std)
    )
    seen = ((preprocess(data) * std + mean) * 255).transpose(1, 2, 0)
    assert np.abs(pixels - seen).mean() < 8  # of 255; another orientation, frame, background or range is far above 20


@pytest.fixture
def made(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Record the images of new thumbnails; half of the images of the dataset are large."""
    for number in range(12):
        (data_set / "images" / f"{number}.png").write_bytes(encoded_noise("PNG", 200 + number, 100))
    images: list[bytes] = []

    def noted(data: bytes, longer_side: int) -> bytes:
        images.append(data)
        return thumbnail(data, longer_side)

    monkeypatch.setattr(pipeline.encoding.thumbnails, "thumbnail", noted)
    return images


def run(data_set: Path, *overrides: str) -> dict[str, Any]:
    return precompute(load_config(data_set / "config.yaml", overrides))


def thumbnails(data_set: Path) -> dict[bytes, bytes]:
    """Return the cached thumbnails by digest."""
    with FeatureReader(data_set / "cache") as features:
        rows = {row: digest for digest, row in features.stored()}
        return {rows[row]: data for row, data in features.thumbnails([*rows, -1, 999]).items()}


def test_each_image_gets_one_thumbnail_once(data_set: Path, made: list[bytes]) -> None:
    summary = run(data_set, "cache.part_rows=10")
    files = [path.read_bytes() for path in (data_set / "images").iterdir()]
    found = thumbnails(data_set)
    assert found == {image_digest(data): thumbnail(data, 128) for data in files}
    assert len(made) == 24
    assert 0 < summary.thumbnail_bytes < summary.cache_bytes
    assert cache_info(data_set / "cache").thumbnail_bytes == summary.thumbnail_bytes
    run(data_set)
    assert len(made) == 24


def test_only_new_images_get_new_thumbnails(data_set: Path, made: list[bytes]) -> None:
    run(data_set)
    write_data_set(data_set / "other", seed=5)
    (data_set / "images" / "1.png").write_bytes((data_set / "other" / "images" / "0.png").read_bytes())
    made.clear()
    run(data_set)
    assert made == [(data_set / "images" / "1.png").read_bytes()]
    assert len(thumbnails(data_set)) == 25  # the thumbnail of the old image is kept


def test_another_size_recreates_thumbnails_and_encodes_nothing(
    data_set: Path, made: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(data_set)
    monkeypatch.setattr("pipeline.commands.precompute.load_encoder", lambda *_: pytest.fail("the encoder was loaded"))
    run(data_set, "precompute.thumbnail_size=50")
    assert len(made) == 48
    sides = [max(Image.open(BytesIO(data)).size) for data in thumbnails(data_set).values()]
    assert sorted(sides) == [50] * 12 + [64] * 12
    assert len([*(data_set / "cache").glob("thumbnails-*")]) == 1
    assert run(data_set, "precompute.thumbnail_size=0").thumbnail_bytes == 0
    assert thumbnails(data_set) == {}
    assert not [*(data_set / "cache").glob("thumbnails-*")]
    assert audit.verify(data_set / "cache").damage == []


def test_killed_run_reuses_its_thumbnails(data_set: Path, made: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.encoding.encoding_loop.EncodingLoop, "fill", killed)
        with pytest.raises(KeyboardInterrupt):
            run(data_set)
    assert len(made) == 24
    assert [len(found.images) for _, found in find_thumbnails(data_set / "cache", "features-00000.h5")] == [24]
    run(data_set)
    assert (len(made), len(thumbnails(data_set))) == (24, 24)


def test_failed_thumbnail_affects_nothing_else(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = (data_set / "images" / "3.png").read_bytes()

    def fails(data: bytes, longer_side: int) -> bytes:
        if data == broken:
            raise ImageError("cannot be made smaller")
        return thumbnail(data, longer_side)

    monkeypatch.setattr(pipeline.encoding.thumbnails, "thumbnail", fails)
    assert run(data_set).encoded == 24
    assert image_digest(broken) not in thumbnails(data_set)
    monkeypatch.undo()
    assert run(data_set).encoded == 0
    assert len(thumbnails(data_set)) == 24


def test_full_disk_is_reported_and_features_are_kept(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Thumbnails, "save", full)
        with pytest.raises(CacheError, match=r"cannot write thumbnails: .*No space left .*run the same command again"):
            run(data_set)
    again = run(data_set)
    assert (again.encoded, again.reused, len(thumbnails(data_set))) == (0, 24, 24)


def test_damage_is_found_and_repaired(data_set: Path) -> None:
    run(data_set)
    (file,) = (data_set / "cache").glob("thumbnails-*")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert [(one.file, one.problem) for one in audit.verify(data_set / "cache").damage] == [
        (file.name, "is damaged (SHA-256 mismatch)")
    ]
    with pytest.raises(CacheError, match="is damaged"):
        thumbnails(data_set)
    assert repair(data_set / "cache").encoded == 0
    assert file.read_bytes() == whole
    assert audit.verify(data_set / "cache").damage == []


def test_thumbnail_files_belong_to_the_cache(data_set: Path) -> None:
    run(data_set)
    half = data_set / "cache" / "thumbnails-00003.h5.tmp"
    half.write_bytes(b"half")
    (data_set / "cache" / "thumbnails-of-my-holiday.h5").write_bytes(b"mine")
    assert half in own_files(data_set / "cache")
    remove(data_set / "cache")
    assert [path.name for path in (data_set / "cache").iterdir()] == ["thumbnails-of-my-holiday.h5"]
