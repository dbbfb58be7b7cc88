"""Datasets passed from Python: records with paths or PIL images, and tables of the `datasets` library."""

import random
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_set import write_config
from datasets import Dataset, DatasetDict
from PIL import Image

from cache.audit import verify
from cache.reader import FeatureReader
from pipeline.batches.split import open_split
from pipeline.blip2.embedded.scenes import draw_scene
from pipeline.commands.cache import verify_cache
from pipeline.commands.precompute import estimate_precompute, precompute
from pipeline.commands.repair import repair
from pipeline.commands.train import train_run
from pipeline.common.errors import ConfigError, PipelineError
from pipeline.config import Config, load_config
from pipeline.data.image_sources import MemoryImage, encode_losslessly
from pipeline.encoding.images import Preprocessor
from pipeline.runs.run import Run

PART = "features-00000.h5"
NO_DATA = {"train": None, "val": None}


def scenes(count: int, seed: int = 0) -> list[Image.Image]:
    rng = random.Random(seed)
    return [Image.fromarray(draw_scene(rng).pixels) for _ in range(count)]


def records_of(images: list[Any]) -> list[dict[str, Any]]:
    return [
        {"image": image, "question": question, "answers": ["red", "red", "blue"], "question_id": f"{number} {question}"}
        for number, image in enumerate(images)
        for question in ("what color is it?", "which color?")
    ]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A config that names no data."""
    return load_config(write_config(tmp_path, data=NO_DATA))


def test_pil_images_are_trained_like_files(config: Config, data_set: Path) -> None:
    images = [Image.open(data_set / "images" / f"{number}.png") for number in range(6)]
    result = precompute(config, data={"train": records_of(images[:4]), "val": records_of(images[4:])})
    assert (result.images, result.encoded, result.questions) == (6, 6, {"train": 8, "val": 4})
    from_files = load_config(write_config(data_set, cache={"dir": f"{data_set}/other/cache"}))
    precompute(from_files)
    found, wanted = FeatureReader(config.cache.dir), FeatureReader(from_files.cache.dir)
    rows = {wanted.text("train").record(i)["image"]: row for i, row in enumerate(wanted.text("train").image_row)}
    row = rows[str(data_set / "images" / "2.png")]
    assert np.array_equal(found.gather(found.text("train").image_row[[4]]), wanted.gather(np.array([row])))
    run = Run(config.train.output_dir / "a")
    train_run(config, run)
    assert (run.adapter / "adapter_model.safetensors").is_file()


def test_same_data_encodes_nothing_and_changed_data_only_new_images(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    precompute(config, {"train": records_of(scenes(5))})
    files = {path.name: path.read_bytes() for path in config.cache.dir.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.commands.precompute.load_encoder", lambda *_: pytest.fail("the encoder was loaded"))
        again = precompute(config, {"train": records_of(scenes(5))})
        assert (again.encoded, again.reused) == (0, 5)
    assert {path.name: path.read_bytes() for path in config.cache.dir.iterdir()} == files
    more = precompute(config, {"train": records_of(scenes(5) + scenes(2, seed=1))})
    assert (more.encoded, more.reused, more.questions) == (2, 5, {"train": 14})


def test_same_image_twice_is_one_row(config: Config) -> None:
    image = scenes(1)[0]
    result = precompute(
        config, {"train": records_of([image, image.copy(), image.transpose(Image.Transpose.ROTATE_90)])}
    )
    assert (result.images, result.questions) == (2, {"train": 6})


def test_paths_are_relative_to_the_images_folder_or_the_current_one(
    data_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(data_set / "config.yaml")
    precompute(config, {"train": records_of(["0.png", Path("1.png")])})
    stored = FeatureReader(config.cache.dir)
    assert stored.text("train").record(0)["image"] == str(data_set / "images" / "0.png")
    assert set(stored.splits) == {"train", "val"}  # val is that of the config
    monkeypatch.chdir(data_set / "images")
    config = load_config(data_set / "config.yaml", ["data.train=null", "data.val=null"])
    assert precompute(config, {"train": records_of(["0.png", "1.png"])}).encoded == 0


def test_dataset_is_read_like_the_hf_format(config: Config) -> None:
    images = scenes(6)
    table = Dataset.from_list([{"image": one, "question": "what?", "answer": "red"} for one in images])
    shuffled = table.train_test_split(test_size=2, seed=0)  # rows with an indices mapping
    result = precompute(config, {"train": shuffled["train"], "val": shuffled["test"]})
    assert (result.images, result.questions) == (6, {"train": 4, "val": 2})
    assert precompute(config, {"train": shuffled["train"], "val": shuffled["test"]}).encoded == 0
    assert str(FeatureReader(config.cache.dir).text("val").record(1)["image"]) == "data['val']: row 1"


def test_dataset_may_name_image_files(config: Config, data_set: Path) -> None:
    paths = [str(data_set / "images" / f"{number}.png") for number in range(3)]
    table = Dataset.from_list([{"image": path, "question": "what?", "answer": "red"} for path in paths])
    assert precompute(config, {"train": table}).encoded == 3


def test_dataset_dict_is_taken_with_its_validation_split(config: Config) -> None:
    table = Dataset.from_list([{"image": one, "question": "what?", "answer": "red"} for one in scenes(2)])
    assert precompute(config, DatasetDict(train=table, validation=table)).questions == {"train": 2, "val": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": 3}, r"data\['train'\]: record 2: 'question' is an integer, not text"),
        ({"image": 3}, r"record 2: 'image' is int, not a path or a PIL image$"),
        ({"image": np.zeros((2, 2))}, r"record 2: 'image' is ndarray, .*; convert an array with PIL.Image.fromarray"),
        ({"answers": [0.5]}, r"record 2: 'answers\[0\]' is a float, not text"),
        ({"question_id": None}, r"record 2: 'question_id' is null"),
    ],
)
def test_malformed_record_error_names_index_and_key(config: Config, change: dict[str, Any], message: str) -> None:
    records = records_of(scenes(2))
    records[2] |= change
    with pytest.raises(PipelineError, match=message):
        precompute(config, {"train": records})


def test_missing_field_or_record_is_named(config: Config) -> None:
    records = records_of(scenes(1))
    for broken, message in (({"question": "what?"}, "record 2: no field 'image'"), (3, "record 2: expected a mapping")):
        with pytest.raises(PipelineError, match=message):
            precompute(config, {"train": [*records, broken]})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"image": "a.png"}], r"data is a list; pass a mapping, such as \{'train': records\}"),
        ({"training": []}, "no split 'training'; allowed: train, val, test"),
        ({"train": "train.jsonl"}, r"data\['train'\] is a str; pass a list of records or a datasets.Dataset"),
        ({"train": DatasetDict(a=Dataset.from_list([]))}, "is a DatasetDict; pass one of its splits: a"),
        ({"train": []}, r"data\['train'\] contains no valid questions"),
    ],
)
def test_invalid_data_raises(config: Config, data: Any, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        precompute(config, data)


def test_config_without_data_raises(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"names no data: set data.train, or pass data="):
        precompute(config)


def test_invalid_items_raise_or_are_skipped_like_those_of_files(tmp_path: Path) -> None:
    records = records_of(scenes(2))
    records += [records[0], {"image": "nowhere.png", "question": "what?", "answer": "red"}]
    file = BytesIO()
    scenes(1, seed=3)[0].save(file, "PNG")
    truncated = Image.open(BytesIO(file.getvalue()[:-200]))
    records.append({"image": truncated, "question": "what?", "answer": "red"})
    records.append({"image": scenes(1)[0], "question": "what?"})
    path = write_config(tmp_path, data=NO_DATA)
    with pytest.raises(PipelineError, match=r"nowhere\.png.*Fix the data, or set precompute.on_invalid=skip"):
        precompute(load_config(path), {"train": records})
    result = precompute(load_config(path, ["precompute.on_invalid=skip"]), {"train": records})
    reasons = {reason.partition(":")[0]: count for reason, count in result.skipped.items()}
    assert reasons == {"not found": 1, "cannot be decoded": 1, "duplicate question_id": 1, "no answer": 1}
    assert result.questions == {"train": 4}


def test_data_replaces_the_split_of_the_config_and_training_uses_it(
    data_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(data_set / "config.yaml")
    precompute(config)
    result = precompute(config, {"train": records_of(scenes(3, seed=9))})
    assert result.questions == {"train": 6, "val": 18}
    capsys.readouterr()
    assert len(open_split(config, "train").text) == 6
    assert "train was passed from Python, and data.train is not used" in capsys.readouterr().err
    assert precompute(config).questions == {"train": 54, "val": 18}  # and back: the files are parsed again
    open_split(config, "train")
    assert "passed from Python" not in capsys.readouterr().err


def test_repair_needs_the_data(config: Config) -> None:
    data = {"train": records_of(scenes(4))}
    precompute(config, data)
    part = config.cache.dir / PART
    part.write_bytes(part.read_bytes()[:-1])
    before = part.read_bytes()
    with pytest.raises(PipelineError, match=r"the data of train was passed from Python .*Repair the cache from Python"):
        repair(config.cache.dir)
    assert part.read_bytes() == before
    assert repair(config.cache.dir, data).encoded == 4
    assert verify(config.cache.dir).damage == []


def test_images_in_memory_are_not_compared_by_verify(config: Config, data_set: Path) -> None:
    precompute(config, {"train": records_of([*scenes(2), data_set / "images" / "0.png"])})
    result = verify_cache(config.cache.dir, reencode=10)
    assert (result.reencoded, result.damaged, result.exit_status) == (1, [], 0)


def test_estimate_accepts_data(config: Config) -> None:
    estimate = estimate_precompute(config, {"train": records_of(scenes(3))})
    assert (estimate.images_found, estimate.to_encode) == (3, 3)
    assert not config.cache.dir.exists()


def deep(kind: str) -> Image.Image:
    return Image.fromarray(np.linspace(0, 60000, 300).astype(kind).reshape(15, 20))


def transparent(mode: str) -> Image.Image:
    image = scenes(1)[0].convert("RGBA")
    image.putalpha(100)
    return image.convert(mode)


MODES = {
    "RGB": lambda: scenes(1)[0],
    "L": lambda: scenes(1)[0].convert("L"),
    "1": lambda: scenes(1)[0].convert("1"),
    "P": lambda: scenes(1)[0].convert("P"),
    "RGBA": lambda: transparent("RGBA"),
    "LA": lambda: transparent("LA"),
    "CMYK": lambda: scenes(1)[0].convert("CMYK"),
    "YCbCr": lambda: scenes(1)[0].convert("YCbCr"),
    "16 bits": lambda: deep("u2"),
    "32 bits": lambda: deep("i4"),
    "float": lambda: deep("f4"),
}


@pytest.mark.parametrize("mode", MODES)
def test_encoding_is_lossless_and_deterministic(checkpoint: Path, mode: str) -> None:
    image = MODES[mode]()
    data = encode_losslessly(image)
    assert data == encode_losslessly(MODES[mode]())
    with Image.open(BytesIO(data)) as decoded:
        wanted = image if mode != "YCbCr" else image.convert("RGB")
        assert np.array_equal(np.asarray(decoded), np.asarray(wanted))
    preprocess = Preprocessor(checkpoint)
    assert np.array_equal(preprocess(data), preprocess.from_image(image))


def test_exif_orientation_is_applied(checkpoint: Path) -> None:
    exif, file = Image.Exif(), BytesIO()
    exif[0x0112] = 6
    scenes(1)[0].resize((40, 20)).save(file, "PNG", exif=exif)
    preprocess = Preprocessor(checkpoint)
    photo = Image.open(BytesIO(file.getvalue()))
    assert np.array_equal(preprocess(encode_losslessly(photo)), preprocess(file.getvalue()))
    assert photo.size == (40, 20)  # the caller's image is unchanged


def test_images_with_equal_pixels_are_equal() -> None:
    image = scenes(1)[0]
    one, two = MemoryImage.of(image, "a"), MemoryImage.of(image.copy(), "b")
    assert (one, hash(one), str(one)) == (two, hash(two), str(two))
    assert one != MemoryImage.of(image.rotate(90), "a")
