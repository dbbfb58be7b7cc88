"""`pipe cache verify` and `repair`: what is detected, encoded again, or left unchanged."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from cache import audit
from cache.format import inspect_part
from cache.reader import FeatureReader
from cache.repair import drop_damaged
from cache.spec import CacheError
from pipeline.batches.split import open_split
from pipeline.commands import cache as cache_command
from pipeline.commands.cache import cache_info, verify_cache
from pipeline.commands.precompute import precompute
from pipeline.commands.repair import repair
from pipeline.common.errors import PipelineError
from pipeline.config import Config, load_config
from pipeline.encoding import encoding_loop as encoding

PART = "features-00000.h5"


@pytest.fixture
def config(data_set: Path) -> Config:
    config = load_config(data_set / "config.yaml")
    precompute(config)
    return config


def damage_row(cache: Path, row: int) -> Path:
    """Flip a bit of a row, and return its image."""
    part = inspect_part(cache / PART)
    data = bytearray(part.path.read_bytes())
    data[part.features_offset + row * part.spec.row_bytes] ^= 1
    part.path.write_bytes(data)
    return next(image for found, image in rows_and_images(cache) if found == row)


def rows_and_images(cache: Path) -> list[tuple[int, Path]]:
    features = FeatureReader(cache)
    tables = [features.text(split) for split in features.splits]
    return [(int(row), Path(table.record(i)["image"])) for table in tables for i, row in enumerate(table.image_row)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cut(part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-1])


@pytest.mark.parametrize("on_invalid", ["error", "skip"])
@pytest.mark.parametrize("whole_part", [False, True])
@pytest.mark.parametrize("hurt", ["gone", "changed"])
def test_nothing_is_removed_before_its_image_is_found(
    data_set: Path, config: Config, on_invalid: str, whole_part: bool, hurt: str
) -> None:
    text = (data_set / "config.yaml").read_text()
    (data_set / "config.yaml").write_text(
        text.replace('"batch_size": 8,', f'"on_invalid": "{on_invalid}", "batch_size": 8,', 1)
    )
    cache = config.cache.dir
    image = damage_row(cache, 5)
    if whole_part:
        cut(cache / PART)
    away = image.with_suffix(".away")
    image.rename(away)
    if hurt == "changed":
        if whole_part:
            pytest.skip("a part that cannot be trusted does not tell what its images were")
        shutil.copy(image.with_name("7.png"), image)
    before = files(cache)
    with pytest.raises(PipelineError, match=re.escape(str(image))):
        repair(data_set / "config.yaml")
    assert files(cache) == before
    away.rename(image)
    assert repair(data_set / "config.yaml").encoded == (24 if whole_part else 1)
    assert audit.verify(cache).damage == []


def test_damaged_row_without_questions_does_not_prevent_repair(data_set: Path, config: Config) -> None:
    image = damage_row(config.cache.dir, 5)
    for split in ("train", "val"):
        file = data_set / f"{split}.jsonl"
        lines = file.read_text().splitlines()
        file.write_text("\n".join(line for line in lines if f'"{image.name}"' not in line))
    image.unlink()
    precompute(config)
    assert repair(config.cache.dir).encoded == 0
    assert audit.verify(config.cache.dir).damage == []


def test_missing_row_is_detected_and_encoded_again(config: Config) -> None:
    cache = config.cache.dir
    damage_row(cache, 5)
    drop_damaged(cache, audit.verify(cache).damage)
    summary = verify_cache(cache)
    assert [re.sub(r"features-\d+", "features", line) for line in summary.damaged] == [
        f"features.h5: row 5 {audit.NOT_STORED}"
    ]
    with pytest.raises(
        CacheError, match=r"row 5 .* was never written\. Run `pipe precompute` again to encode its image"
    ):
        open_split(config, "train").features.gather(np.array([5]))
    assert repair(cache).encoded == 1
    assert verify_cache(cache).damaged == []


@pytest.mark.parametrize("hurt", [cut, Path.unlink], ids=["cut", "missing"])
def test_lost_part_is_repaired_without_a_config(config: Config, hurt) -> None:
    cache = config.cache.dir
    hurt(cache / PART)
    assert verify_cache(cache).damaged
    assert repair(cache).encoded == 24
    assert verify_cache(cache).damaged == []


def test_cache_with_another_spec_is_kept(data_set: Path, config: Config) -> None:
    damage_row(config.cache.dir, 5)
    path = data_set / "config.yaml"
    path.write_text(path.read_text().replace('"float32"', '"float16"', 1))
    before = files(config.cache.dir)
    with pytest.raises(PipelineError, match=r"not made with this checkpoint and config. Nothing was changed"):
        repair(path)
    assert files(config.cache.dir) == before


def test_foreign_part_is_named_with_a_remedy(config: Config) -> None:
    cache = config.cache.dir
    stray = cache / "features-00007.h5"
    stray.write_bytes(bytes(50_000))
    assert verify_cache(cache).damaged == [f"{stray.name}: {audit.NOT_A_PART}"]
    assert cache_info(cache).not_in_manifest == [stray.name]
    for run in (lambda: precompute(config), lambda: repair(cache)):
        with pytest.raises(CacheError, match=r"features-00007\.h5: is not a part of this cache.*(D|d)elete") as error:
            run()
        assert "synchronously" not in str(error.value)
    stray.unlink()
    assert precompute(config).encoded == 0


def bars(monkeypatch: pytest.MonkeyPatch, module: object) -> list:
    made, make = [], module.progress_bar
    monkeypatch.setattr(module, "progress_bar", lambda *words, **more: made.append(make(*words, **more)) or made[-1])
    return made


def test_progress_bar_of_verify_completes(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bars(monkeypatch, cache_command)
    assert verify_cache(config.cache.dir).damaged == []
    assert [(bar.n, bar.desc) for bar in made] == [(bar.total, "verifying") for bar in made]


def test_progress_bar_of_encoding_completes_with_an_invalid_image(
    data_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = data_set / "images" / "5.png"
    broken.write_bytes(broken.read_bytes()[:-200])
    made = bars(monkeypatch, encoding)
    summary = precompute(load_config(data_set / "config.yaml", ["precompute.on_invalid=skip"]))
    assert (summary.encoded, summary.failed) == (23, 1)
    assert [(bar.n, bar.total) for bar in made] == [(24, 24)]
