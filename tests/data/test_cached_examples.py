"""What a finished cache was made of is parsed again only if any of it has changed."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from data_set import write_config, write_data_set

import pipeline.data.cached_examples
import pipeline.encoding.preflight
from cache.manifest import Manifest
from cache.reader import FeatureReader
from pipeline.commands.precompute import precompute
from pipeline.config import load_config
from pipeline.data.cached_examples import CachedExamples, images_of
from pipeline.data.examples import VQAExample

NAMES = ['a "quoted".png', "back\\slash.png", "北京 🚀.png", '"image": "x.png', "plain.png"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config with relative paths, in the working folder; the cache is finished."""
    write_data_set(tmp_path, num_images=8)
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(NAMES):
        (tmp_path / "images" / f"{number}.png").rename(tmp_path / "images" / name)
    for split in ("train", "val"):
        lines = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        for line in lines:
            number = int(line["image"].removesuffix(".png"))
            line["image"] = NAMES[number] if number < len(NAMES) else line["image"]
            line["question"] += ' "image": "y.png" \\'
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = {split: {"annotations": f"{split}.jsonl", "images": "images"} for split in ("train", "val")}
    write_config(tmp_path, data=files, cache={"dir": "cache"})
    precompute(load_config(tmp_path / "config.yaml"))
    return tmp_path


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that were parsed."""
    seen: list[str] = []
    read = pipeline.encoding.preflight.read_split

    def noting(format: str, split: str, *rest: object) -> object:
        seen.append(split)
        return read(format, split, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline.encoding.preflight, "read_split", noting)
    return seen


def again(*overrides: str) -> dict[str, object]:
    summary = precompute(load_config(Path("config.yaml"), list(overrides)))
    assert summary
    return summary


def text_files() -> dict[str, tuple[str, int]]:
    splits = Manifest.load(Path("cache")).splits
    return {split: (entry.file, Path("cache", entry.file).stat().st_mtime_ns) for split, entry in splits.items()}


def test_with_nothing_changed_nothing_is_parsed_or_written(data: Path, parsed: list[str]) -> None:
    before = text_files()
    summary = again()
    assert parsed == []
    assert text_files() == before
    assert summary["questions"] == {"train": 18, "val": 6}


def test_cached_questions_are_those_that_were_read(data: Path) -> None:
    config = load_config(data / "config.yaml").data
    found = pipeline.data.cached_examples.unchanged_split(FeatureReader(Path("cache")), config, "train")
    assert found
    assert config.train
    read, hashes = pipeline.encoding.preflight.read_split("jsonl", "train", config.train)
    assert isinstance(found[0], CachedExamples)
    assert list(found[0]) == list(read.examples)
    assert found[0][1:3] == list(read.examples)[1:3]
    assert images_of(found[0]) == images_of(read.examples)
    assert found[1] == hashes


def edit_in_place(data: Path) -> list[str]:
    """Another answer of the same length, under the same time."""
    path = data / "train.jsonl"
    time = path.stat().st_mtime_ns
    text = path.read_text()
    path.write_text(text.replace('"what shape', '"what shade', 1))
    assert path.stat().st_size == len(text.encode())
    os.utime(path, ns=(time, time))
    return []


def move_pictures(data: Path) -> list[str]:
    (data / "images").rename(data / "moved")
    return ["data.train.images=moved", "data.val.images=moved"]


def spell_another_way(data: Path) -> list[str]:
    return [f"data.{split}.images={data}/images" for split in ("train", "val")]


def another_file(data: Path) -> list[str]:
    (data / "train.jsonl").rename(data / "other.jsonl")
    return ["data.train.annotations=other.jsonl"]


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (edit_in_place, ["train"]),
        (move_pictures, ["train", "val"]),
        (spell_another_way, ["train", "val"]),
        (another_file, ["train"]),
    ],
)
def test_what_has_changed_is_parsed(
    data: Path, parsed: list[str], change: Callable[[Path], list[str]], wanted: list[str]
) -> None:
    overrides = change(data)
    again(*overrides)
    assert parsed == wanted
    config = load_config(data / "config.yaml", overrides).data
    assert config.train
    read, _ = pipeline.encoding.preflight.read_split("jsonl", "train", config.train)
    text = FeatureReader(Path("cache")).text("train")
    assert [VQAExample.from_record(text.record(number)) for number in range(len(text))] == list(read.examples)


def test_other_code_reads_again(data: Path, parsed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.data.cached_examples, "reader_fingerprint", lambda: "other")
    again()
    assert parsed == ["train", "val"]


def test_what_was_skipped_is_looked_for_again(data: Path, parsed: list[str]) -> None:
    skip = "precompute.on_invalid=skip"
    (data / "images" / "plain.png").rename(data / "away.png")
    assert again(skip)["skipped"] == {"not there": 3}
    parsed.clear()
    (data / "away.png").rename(data / "images" / "plain.png")
    assert again(skip)["skipped"] == {}
    assert parsed == ["train", "val"]
    assert again(skip)["questions"] == {"train": 18, "val": 6}


def test_a_name_that_was_respelled_is_looked_for_again(data: Path, parsed: list[str]) -> None:
    lines = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(lines.replace("plain.png", "cafe\u0301.png"))
    (data / "images" / "caf\u00e9.png").write_bytes((data / "images" / "5.png").read_bytes())
    again()
    parsed.clear()
    (data / "images" / "cafe\u0301.png").write_bytes((data / "images" / "6.png").read_bytes())
    again()
    assert "train" in parsed
    text = FeatureReader(Path("cache")).text("train")
    images = {text.record(number)["image"] for number in range(len(text))}
    assert "images/cafe\u0301.png" in images
    assert "images/caf\u00e9.png" not in images


def test_a_picture_that_is_gone_or_edited_is_noticed(data: Path, parsed: list[str]) -> None:
    (data / "images" / "5.png").write_bytes((data / "images" / "6.png").read_bytes())
    assert again()["encoded"] == 0
    text = FeatureReader(Path("cache")).text("train")
    row = {text.record(number)["image"]: int(text.image_row[number]) for number in range(len(text))}
    assert row["images/5.png"] == row["images/6.png"]
    (data / "images" / "5.png").unlink()
    summary = again("precompute.on_invalid=skip")
    assert parsed == []
    assert summary["skipped"] == {"not there": 3}
    assert summary["questions"] == {"train": 15, "val": 6}


def test_a_damaged_text_is_read_again(data: Path, parsed: list[str]) -> None:
    path = Path("cache") / Manifest.load(Path("cache")).splits["train"].file
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    again()
    assert parsed == ["train"]
    assert len(FeatureReader(Path("cache")).text("train")) == 18
