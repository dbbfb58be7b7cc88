"""Image files under names that are spelled another way than in the annotations."""

import json
from pathlib import Path
from unicodedata import normalize

import pytest
from data_set import write_config, write_data_set

from cache.reader import FeatureReader
from pipeline.commands.precompute import precompute
from pipeline.common.errors import PipelineError
from pipeline.config import load_config
from pipeline.data.spelling import find_spelled

NFC, NFD = normalize("NFC", "café é.png"), normalize("NFD", "café é.png")


@pytest.mark.parametrize(
    ("written", "there"),
    [
        (NFC, NFD),
        (NFD, NFC),
        ("a\\b.png", "a/b.png"),
        (".\\a\\b.png", "a/b.png"),
        (f"a\\{NFC}", f"a/{NFD}"),
        (f"{NFC}/b.png", f"{NFD}/b.png"),
    ],
)
def test_the_same_name_is_found(tmp_path: Path, written: str, there: str) -> None:
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).touch()
    assert find_spelled([tmp_path / written]) == ({tmp_path / written: tmp_path / there}, {})


@pytest.mark.parametrize(
    ("written", "there"),
    [
        ("a.jpg", "A.JPG"),
        ("Images/a.png", "images/A.png"),
        ("A\\b.png", "a/B.png"),
        ("É.png", normalize("NFD", "é.PNG")),
    ],
)
def test_a_name_in_other_case_is_near(tmp_path: Path, written: str, there: str) -> None:
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).touch()
    assert find_spelled([tmp_path / written]) == ({}, {tmp_path / written: tmp_path / there})


@pytest.mark.parametrize(
    ("written", "there"),
    [
        ("a.png", ["A.png", "a.PNG"]),
        ("\u00c5.png", ["A\u030a.png", "\u212b.png"]),  # Å three times
        ("a.png", ["b.png"]),
        ("..\\secret.png", ["a.png"]),
        ("a.png", ["a.PNG/inside"]),
    ],
)
def test_what_fits_several_files_or_none_is_neither(tmp_path: Path, written: str, there: list[str]) -> None:
    (tmp_path / "secret.png").touch()
    for name in there:
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "images" / name).touch()
    assert find_spelled([tmp_path / "images" / written]) == ({}, {})


def test_a_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[Path] = []
    list_folder = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda folder: listed.append(folder) or list_folder(folder))
    find_spelled([tmp_path / f"{number}.png" for number in range(100)])
    assert len(listed) <= 2


def test_precompute_uses_the_same_and_names_the_near(tmp_path: Path) -> None:
    write_data_set(tmp_path, num_images=4)
    images = tmp_path / "images"
    (images / "0.png").rename(images / NFD)
    (images / "1.png").rename(images / "One.PNG")
    rows = [{"image": name, "question": "what?", "answer": "red"} for name in (NFC, NFD, "2.png", ".\\3.png")]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = write_config(tmp_path, data={"val": None})
    for _ in range(2):
        summary = precompute(load_config(path))
        assert summary
        assert (summary["images"], summary["questions"], summary["failed"]) == (3, {"train": 4}, 0)
    text = FeatureReader(tmp_path / "cache").text("train")
    assert text.record(0)["image"] == str(images / NFD)
    assert text.image_row[0] == text.image_row[1]
    rows.append({"image": "one.png", "question": "what?", "answer": "red"})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(PipelineError, match=r"capital letters: .*one\.png \(there is .*One\.PNG\)"):
        precompute(load_config(path))
