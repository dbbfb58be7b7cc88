"""Tables of the `datasets` library: published formats, errors, and both stages on them."""

import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_set import write_config, write_data_set
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from cache.audit import verify
from cache.reader import FeatureReader
from pipeline.batches.split import open_split
from pipeline.commands.evaluate import evaluate
from pipeline.commands.precompute import precompute
from pipeline.commands.repair import repair
from pipeline.commands.train import train_run
from pipeline.common.errors import ConfigError, PipelineError
from pipeline.common.table_name import TableName
from pipeline.config import Config, SplitFiles, load_config
from pipeline.data.examples import DIFFICULT, Split
from pipeline.data.image_sources import TableImage
from pipeline.data.tables import table_fingerprint
from pipeline.data.vqa import read_examples
from pipeline.encoding.dataset_scan import scan_dataset
from pipeline.encoding.images import ImageError, read_image_bytes
from pipeline.encoding.reencode import reencode
from pipeline.runs.run import Run

PART = "features-00000.h5"
ANSWERS = [{"answer": "red", "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)]
VQAV2 = Features(
    question_type=Value("string"),
    multiple_choice_answer=Value("string"),
    answers=List({"answer": Value("string"), "answer_confidence": Value("string"), "answer_id": Value("int64")}),
    image_id=Value("int64"),
    answer_type=Value("string"),
    question_id=Value("int64"),
    question=Value("string"),
    image=ImageFeature(),
)
TEXTVQA = Features(
    image_id=Value("string"),
    question_id=Value("int32"),
    question=Value("string"),
    image=ImageFeature(),
    answers=List(Value("string")),
)


@pytest.fixture(autouse=True)
def _arrow_copies_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    datasets.disable_progress_bars()


def png(shade: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def vqav2_row(number: int, **changes: Any) -> dict[str, Any]:
    """Return a row of lmms-lab/VQAv2; each image has two questions and occurs twice."""
    return {
        "question_type": "what color is the",
        "multiple_choice_answer": "red",
        "answers": ANSWERS,
        "image_id": number // 2,
        "answer_type": "other",
        "question_id": 1000 + number,
        "question": f"what color is {number}?",
        "image": {"bytes": png(number // 2), "path": f"COCO_val2014_{number // 2:012d}.jpg"},
    } | changes


def vqav2(*numbers: int) -> Dataset:
    return Dataset.from_list([vqav2_row(number) for number in numbers], features=VQAV2)


def plain(folder: Path, *rows: dict[str, Any], **columns: Any) -> Path:
    """Write a parquet file without the library's metadata: LINE, with changed rows and replaced columns."""
    line = {"question": "what color?", "image": {"bytes": png(), "path": None}, "answer": "red"}
    made = pa.Table.from_pylist([line | row for row in rows or [{}]])
    for name, values in columns.items():
        made = made.append_column(name, pa.array(values)) if name not in made.column_names else made.set_column(
            made.column_names.index(name), name, pa.array(values)
        )  # fmt: skip
    path = folder / "table.parquet"
    pq.write_table(made, path)
    return path


def read(dataset: Path | str, split: str = "val", **keys: Any) -> Split:
    files = SplitFiles(dataset=str(dataset), **keys)
    return read_examples("hf", split, images=files.images, tables=files.tables)


# ---- published formats


def saved_parquet(folder: Path, table: Dataset) -> str:
    table.to_parquet(folder / "validation.parquet")
    return f"{folder}/validation.parquet"


def saved_parts(folder: Path, table: Dataset) -> str:
    for part in range(2):
        table.shard(2, part, contiguous=True).to_parquet(folder / f"validation-{part:05d}-of-00002.parquet")
    return f"{folder}/validation-*.parquet"


def saved_repository(folder: Path, table: Dataset) -> str:
    (folder / "data").mkdir()
    table.to_parquet(folder / "data" / "validation-00000-of-00001.parquet")
    vqav2(50).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return str(folder)


def saved_to_disk(folder: Path, table: Dataset) -> str:
    table.save_to_disk(folder / "saved", num_shards=2)
    return str(folder / "saved")


def saved_splits(folder: Path, table: Dataset) -> str:
    DatasetDict(validation=table, test=vqav2(50)).save_to_disk(folder / "saved")
    return str(folder / "saved")


def saved_arrow(folder: Path, table: Dataset) -> str:
    return str(next(Path(saved_to_disk(folder, table)).glob("*-00000-of-*.arrow")).parent / "*.arrow")


def saved_arrow_file_form(folder: Path, table: Dataset) -> str:
    data = table.with_format("arrow")[:]
    with pa.OSFile(f"{folder}/validation.arrow", "wb") as sink, pa.ipc.new_file(sink, data.schema) as writer:
        writer.write_table(data)
    return f"{folder}/validation.arrow"


@pytest.mark.parametrize(
    "save",
    [saved_parquet, saved_parts, saved_repository, saved_to_disk, saved_splits, saved_arrow, saved_arrow_file_form],
)
def test_vqav2_in_every_file_form(tmp_path: Path, save: Callable[[Path, Dataset], str]) -> None:
    (tmp_path / "t").mkdir()
    examples, skipped = read(save(tmp_path / "t", vqav2(*range(6))))
    assert skipped == []
    assert [example.question_id for example in examples] == list(range(1000, 1006))
    assert [read_image_bytes(example.image) for example in examples] == [png(n // 2) for n in range(6)]
    assert {(e.answers, e.answer_type, e.question_type) for e in examples} == {
        (("red",) * 10, "other", "what color is the")
    }


def test_errors_name_table_and_row(tmp_path: Path) -> None:
    path = saved_parquet(tmp_path, vqav2(0, 1))
    assert [str(example.image) for example in read(path).examples] == [f"{path}: row 0", f"{path}: row 1"]
    folder = saved_splits(tmp_path, vqav2(0))
    assert str(read(folder).examples[0].image) == f"{folder} validation: row 0"


def test_textvqa_and_test_split_without_answers(tmp_path: Path) -> None:
    rows = [
        {"image_id": "a", "question_id": 34602, "question": "what brand?", "image": {"bytes": png()}, "answers": given}
        for given in (["dakota", "dakota digital"], [], None)
    ]
    rows = [row | {"question_id": number} for number, row in enumerate(rows)]
    table = Dataset.from_list(rows, features=TEXTVQA)
    path = saved_parquet(tmp_path, table)
    assert [example.answers for example in read(path, "test").examples] == [("dakota", "dakota digital"), (), ()]
    examples, skipped = read(path, "train")
    assert [example.question_id for example in examples] == [0]
    assert [(one.reason, one.where) for one in skipped] == [("no answer", f"{path}: row {n}") for n in (1, 2)]


def gqa(folder: Path) -> dict[str, str]:
    """Write lmms-lab/GQA: questions in one table, images in another; the image of the last question is missing."""
    asked = [{"id": f"0{n}", "imageId": f"n{n % 2}", "question": "is it red?", "answer": "yes"} for n in range(4)]
    Dataset.from_list([*asked, asked[0] | {"id": "09", "imageId": "n7"}]).to_parquet(folder / "instructions.parquet")
    images = [{"id": f"n{n}", "image": {"bytes": png(n), "path": f"{n}.jpg"}} for n in (1, 0)]
    table = Dataset.from_list(images, features=Features(id=Value("string"), image=ImageFeature()))
    table.to_parquet(folder / "images.parquet")
    return {"dataset": f"{folder}/instructions.parquet", "image_dataset": f"{folder}/images.parquet"}


def test_gqa_joins_two_tables(tmp_path: Path) -> None:
    paths = gqa(tmp_path)
    examples, skipped = read(**paths)
    assert [(e.question_id, e.answers) for e in examples] == [(f"0{n}", ("yes",)) for n in range(4)]
    assert [read_image_bytes(example.image) for example in examples] == [png(n % 2) for n in range(4)]
    assert str(examples[0].image) == f"{paths['image_dataset']}: row 1"
    assert [(one.reason, one.where, one.image) for one in skipped] == [
        ("no image in data.val.image_dataset", f"{paths['dataset']}: row 4", "n7")
    ]
    with pytest.raises(
        PipelineError, match=r"instructions\.parquet: no column image, and the config sets neither image_dataset"
    ):
        read(paths["dataset"])


@pytest.mark.parametrize(
    ("cells", "answers"),
    [
        ({"answer": "red"}, ("red",)),
        ({"answer": ["red", "blue"]}, ("red", "blue")),
        ({"answers": {"answer": ["red", "blue"], "answer_id": [1, 2]}}, ("red", "blue")),
        ({"answers": ["red"], "answer": "blue", "multiple_choice_answer": "gray"}, ("red",)),
        ({"answers": [], "multiple_choice_answer": "gray"}, ("gray",)),
        ({"answers": None, "answer": "blue"}, ("blue",)),
        ({"direct_answers": ["red", "blue"]}, ("red", "blue")),
        ({"direct_answers": "['red', 'blue']"}, ("red", "blue")),
        ({"direct_answers": "['red', __import__('os').abort()]"}, None),
    ],
)
def test_answer_columns_are_detected(tmp_path: Path, cells: dict[str, Any], answers: tuple[str, ...] | None) -> None:
    row = {"question": "what?", "image": {"bytes": png(), "path": None}} | cells
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "table.parquet")
    if answers is None:
        with pytest.raises(PipelineError, match=r"table\.parquet: row 0: 'direct_answers' is not a list"):
            read(tmp_path / "table.parquet")
    else:
        assert [example.answers for example in read(tmp_path / "table.parquet").examples] == [answers]


def test_aokvqa_marks_difficult_questions(tmp_path: Path) -> None:
    difficult = [{"difficult_direct_answer": value} for value in (True, False)]
    assert [example.answer_type for example in read(plain(tmp_path, *difficult)).examples] == [DIFFICULT, None]


@pytest.mark.parametrize("name", ["question_id", "questionId", "id"])
def test_id_column_is_detected(tmp_path: Path, name: str) -> None:
    assert [e.question_id for e in read(plain(tmp_path, {name: "a"}, {name: "b"})).examples] == ["a", "b"]


def test_default_id_is_the_row_number(tmp_path: Path) -> None:
    assert [example.question_id for example in read(plain(tmp_path, {}, {})).examples] == [0, 1]


def test_sliced_split_has_the_images_of_its_rows(tmp_path: Path) -> None:
    for path in (saved_parquet(tmp_path, vqav2(*range(10))), saved_to_disk(tmp_path, vqav2(*range(10)))):
        ends = [read(path, dataset_split=part).examples for part in ("train[:60%]", "train[60%:]")]
        assert [e.question_id for end in ends for e in end] == list(range(1000, 1010))
        assert [read_image_bytes(e.image) for end in ends for e in end] == [png(n // 2) for n in range(10)]


# ---- images


@pytest.mark.parametrize(
    ("image", "stored"),
    [
        ({"bytes": png(3), "path": "/nowhere/a.png"}, png(3)),
        ({"bytes": None, "path": "a.png"}, png(9)),
        ({"bytes": None, "path": "gone.png"}, "not found"),
        ({"bytes": None, "path": "../a.png"}, "no image in this row"),
        ({"bytes": None, "path": __file__}, "no image in this row"),
        ({"bytes": b"", "path": "a.png"}, b""),
        ({"bytes": None, "path": ""}, "no image in this row"),
        (None, "no image in this row"),
    ],
)
def test_image_is_bytes_or_a_file_next_to_the_table(tmp_path: Path, image: Any, stored: bytes | str) -> None:
    (tmp_path / "a.png").write_bytes(png(9))
    path = plain(tmp_path, {"image": {"bytes": png(), "path": "x"}}, {"image": image})
    image = read(path).examples[1].image
    if isinstance(stored, bytes):
        assert read_image_bytes(image) == stored
    else:
        with pytest.raises(ImageError, match=stored):
            read_image_bytes(image)


def test_columns_of_bytes_and_of_file_names(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(9))
    assert read_image_bytes(read(plain(tmp_path, image=[png(5)])).examples[0].image) == png(5)
    named = read(plain(tmp_path, image=["a.png"]), images=tmp_path / "images").examples
    assert read_image_bytes(named[0].image) == png(9)


def test_table_image_is_picklable(tmp_path: Path) -> None:
    images = [example.image for example in read(saved_parquet(tmp_path, vqav2(0, 2, 4))).examples]
    assert read_image_bytes(images[0]) == png(0)  # opens the column
    again = pickle.loads(pickle.dumps(dict(enumerate(images))))
    assert len(pickle.dumps(images)) < 10_000
    assert [again[n] for n in range(3)] == images == sorted(images)
    (tmp_path / "them").write_bytes(pickle.dumps(again))
    script = (
        "import pickle, sys, pathlib; from hashlib import sha256\n"
        "from pipeline.encoding.images import read_image_bytes\n"
        "for image in pickle.loads(pathlib.Path(sys.argv[1]).read_bytes()).values():\n"
        "    print(sha256(read_image_bytes(image)).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "them"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [sha256(png(n)).hexdigest() for n in range(3)]


# ---- invalid tables


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([{}, {"question": None}], {}, r"row 1: 'question' is null, not text"),
        ([{}], {"question": [5]}, r"row 0: 'question' is an integer, not text"),
        ([{}], {"question": [["a"]]}, r"row 0: 'question' is a list, not text"),
        ([{}, {}], {"answer": [None, 7.5]}, r"row 1: 'answer' is a float, not text; write"),
        ([{}], {"answers": [[["red"]]]}, r"row 0: 'answers\[0\]' is a list, not text"),
        ([{}], {"answers": [["red", None]]}, r"row 0: 'answers\[1\]' is null, not text"),
        ([{}], {"answers": [[{"text": "red"}]]}, r"row 0: 'answers\[0\]' is null, not text"),
        ([{}], {"answers": [2.5]}, r"row 0: 'answers' is a float, not text"),
        ([{}], {"question_id": [None]}, r"row 0: 'question_id' is null, not an integer"),
        ([{}], {"question_id": [1.5]}, r"row 0: 'question_id' is a float"),
        ([{}], {"image": [7]}, r"column 'image' has type int64, not images"),
        ([{}], {"image": [[png()]]}, r"column 'image' has type list<.*>, not images"),
        ([{}], {"image": [{"bytes": "text"}]}, r"column 'image' has type struct<bytes: string>, not images"),
        ([{}], {"image": [{"width": 7}]}, r"column 'image' has type struct<width: int64>, not images"),
    ],
)
def test_malformed_row_or_column_is_named(
    tmp_path: Path, rows: list[dict[str, Any]], columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(PipelineError, match=rf"table\.parquet: {message}"):
        read(plain(tmp_path, *rows, **columns))


def test_invalid_utf8_is_reported(tmp_path: Path) -> None:
    damaged = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    path = plain(tmp_path)
    table = pq.read_table(path).set_column(0, "question", damaged)
    pq.write_table(table, path)
    with pytest.raises(PipelineError, match=r"table\.parquet: column 'question' is damaged: .*Invalid UTF8"):
        read(path)


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("question", r"no column question; its columns are id, image, answer"),
        ("answer", r"no column answers or direct_answers or answer or multiple_choice_answer; its columns are id"),
        ("image", r"no column image, and the config sets neither image_dataset nor image_subset; its columns are"),
    ],
)
def test_missing_column_error_lists_the_columns(tmp_path: Path, without: str, message: str) -> None:
    row = {"id": 1, "question": "what?", "image": png(), "answer": "red"}
    row.pop(without)
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "table.parquet")
    with pytest.raises(PipelineError, match=rf"table\.parquet: {message}"):
        read(tmp_path / "table.parquet")


def test_optional_columns_of_other_types_are_ignored(tmp_path: Path) -> None:
    (example,) = read(plain(tmp_path, answer_type=[3], question_type=[["a"]])).examples
    assert (example.answer_type, example.question_type) == (None, None)


@pytest.mark.parametrize("keep", [0, 3, 100, -200, -4])
@pytest.mark.parametrize("name", ["table.parquet", "table.arrow"])
def test_truncated_or_foreign_files_are_reported(tmp_path: Path, keep: int, name: str) -> None:
    path = tmp_path / name
    whole = Path(saved_parquet(tmp_path, vqav2(0, 1)) if name.endswith("parquet") else saved_stream(tmp_path))
    path.write_bytes(whole.read_bytes()[:keep])
    with pytest.raises(PipelineError) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def saved_stream(folder: Path) -> str:
    vqav2(0, 1).save_to_disk(folder / "saved")
    return str(folder / "saved" / "data-00000-of-00001.arrow")


def test_files_with_different_columns_are_reported(tmp_path: Path) -> None:
    vqav2(0).to_parquet(tmp_path / "part-0.parquet")
    vqav2(1).remove_columns("answers").rename_column("question", "text").to_parquet(tmp_path / "part-1.parquet")
    with pytest.raises(PipelineError, match=r"part-\*\.parquet \(data\.val\.dataset\): ") as error:
        read(tmp_path / "part-*.parquet")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("nowhere.parquet", r"not found, or contains no files with the suffix \.parquet or \.arrow"),
        ("no/such/folder", r"not found, or contains no files"),
        ("*.parquet", r"not found, or contains no files"),
        ("text.txt", r"format hf reads only files with the suffix \.parquet or \.arrow"),
        ("", r"not found, or contains no files"),
    ],
)
def test_missing_files_are_reported(tmp_path: Path, dataset: str, message: str) -> None:
    (tmp_path / "text.txt").write_text("a")
    with pytest.raises(PipelineError, match=rf"\(data\.val\.dataset\): {message}"):
        read(tmp_path / dataset)


def test_missing_split_error_lists_the_splits(tmp_path: Path) -> None:
    folder = saved_splits(tmp_path, vqav2(0))
    with pytest.raises(PipelineError, match=r"no split 'train'; set dataset_split to one of validation, test"):
        read(folder, "train")
    assert read(folder, "train", dataset_split="validation").examples
    with pytest.raises(PipelineError, match=r"no split 'nix'; set dataset_split to one of validation, test"):
        read(folder, dataset_split="nix")
    with pytest.raises(PipelineError, match=r"\(data\.val\.dataset\): .*validation\[nix"):
        read(folder, dataset_split="validation[nix]")


def test_empty_table_is_reported(tmp_path: Path) -> None:
    path = saved_parquet(tmp_path, vqav2(0).select([]))
    with pytest.raises(PipelineError, match=r"validation\.parquet \(data\.val\.dataset\): .*no data"):
        read(path)


# ---- the hub


class Hub:
    """Replace the hub: return what the library would resolve an id to."""

    def __init__(self, **splits: list[str]) -> None:
        self.splits, self.asked = splits, []

    def __call__(self, path: str, name: str | None = None, revision: str | None = None) -> Any:
        self.asked.append((path, name, revision))
        return SimpleNamespace(name="parquet", config=SimpleNamespace(data_files=self.splits))


def test_hub_id_downloads_only_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(validation=[saved_parquet(tmp_path, vqav2(0, 1))], test=[f"{tmp_path}/not-fetched.parquet"])
    monkeypatch.setattr(datasets, "load_dataset_builder", hub)
    examples, _ = read("lmms-lab/VQAv2", revision="abc")
    assert str(examples[1].image) == "lmms-lab/VQAv2@abc validation: row 1"
    assert hub.asked == [("lmms-lab/VQAv2", None, "abc")]
    with pytest.raises(
        PipelineError, match=r"lmms-lab/VQAv2 \(data\.train\.dataset\): no split 'train'; set dataset_split to one of"
    ):
        read("lmms-lab/VQAv2", "train")


def test_hub_id_with_images_in_another_subset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = gqa(tmp_path)
    subsets = {"instructions": Hub(val=[local["dataset"]]), "images": Hub(val=[local["image_dataset"]])}
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda path, name, revision: subsets[name](path))
    examples, skipped = read("lmms-lab/GQA", subset="instructions", image_subset="images")
    assert (len(examples), len(skipped)) == (4, 1)
    assert str(examples[0].image) == "lmms-lab/GQA images val: row 1"


def test_offline_cached_hub_dataset_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    config, info = SimpleNamespace(data_files=None), SimpleNamespace(splits={"train": None, "validation": None})
    cached = SimpleNamespace(config=config, info=info, as_dataset=lambda split: vqav2(len(split)))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: cached)
    assert [example.question_id for example in read("a/b").examples] == [1000 + len("validation")]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), r"Couldn't reach .*hf download a/b --repo-type dataset"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is gated."), r"is gated\. .*`hf auth login`"),
        (ValueError("BuilderConfig 'x' not found. Available: ['y']"), r"'x' not found\. Available: \['y'\]"),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), r"scripts are no longer supported"),
        (KeyError(), r"KeyError"),
    ],
)
def test_hub_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(PipelineError, match=rf"^a/b \(data\.val\.dataset\): .*{message}"):
        read("a/b")


def test_missing_datasets_library_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PipelineError, match=r'pip install "datasets>=4"'):
        read("a/b")


def run_pipe(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from pipeline.cli import main; sys.argv[0] = 'pipe'; main()"
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_offline_error_names_the_remedy(tmp_path: Path) -> None:
    config = write_config(tmp_path, data={"format": "hf", "train": {"dataset": "lmms-lab/VQAv2"}, "val": None})
    done = run_pipe("precompute", config, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("pipe: lmms-lab/VQAv2 (data.train.dataset): Couldn't reach")
    assert done.stderr.count("\n") == 1


def test_other_formats_do_not_import_datasets(data_set: Path) -> None:
    script = (
        "import sys; from pathlib import Path\nfrom pipeline.config import load_config\nimport pipeline.cli\n"
        "from pipeline.encoding.dataset_scan import scan_dataset\nscan_dataset(load_config(Path(sys.argv[1])).data)\n"
        "sys.exit('datasets' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, data_set / "config.yaml"], check=True)


# ---- the config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"format": "jsonl", "train": {"dataset": "a/b"}}, r"train\.dataset is not a key of the format jsonl"),
        (
            {"format": "hf", "val": {"dataset": "a", "annotations": "b"}},
            r"val\.annotations is not a key of",
        ),
    ],
)
def test_keys_of_other_formats_raise(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"data": data, "cache": {"dir": "c"}}))
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_dataset_key_is_required() -> None:
    with pytest.raises(PipelineError, match=r"data\.train\.dataset is not set"):
        read_examples("hf", "train")


def test_paths_become_absolute_but_hub_ids_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    for local in ("saved", "a.parquet", "data/*.parquet", "./a/b"):
        assert SplitFiles(dataset=local, image_dataset=local).absolute() == SplitFiles(
            dataset=str(tmp_path / local), image_dataset=str(tmp_path / local)
        )
    for hub in ("lmms-lab/VQAv2", "vqa"):
        assert SplitFiles(dataset=hub, images=None).absolute().dataset == hub


# ---- the stages


def in_tables(folder: Path) -> Path:
    """Write the dataset in `folder` as parquet files, and return a config for them."""
    for split in ("train", "val"):
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        for row in rows:
            row["image"] = {"bytes": (folder / "images" / row["image"]).read_bytes(), "path": row["image"]}
        table = pa.Table.from_pylist([{"question_id": number} | row for number, row in enumerate(rows, 1)])
        pq.write_table(table, folder / f"{split}.parquet")
    data = {split: {"dataset": f"{folder}/{split}.parquet"} for split in ("train", "val")}
    return write_config(folder, data={"format": "hf", **data})


@pytest.fixture
def tables(data_set: Path) -> Config:
    return load_config(in_tables(data_set))


def test_tables_and_files_give_the_same_results(tmp_path: Path) -> None:
    made = {}
    for kind in ("files", "tables"):
        folder = tmp_path / kind
        write_data_set(folder)
        config = load_config(in_tables(folder) if kind == "tables" else write_config(folder))
        made[kind] = config, precompute(config), scan_dataset(config.data)
    (files, of_files, in_files), (table, of_tables, in_table) = made.values()
    assert (of_files.images, of_tables.images, of_tables.encoded) == (24, 24, 24)
    assert (in_files.num_images, in_table.num_images) == (24, 72)  # one row per question
    assert list(in_files.images) == list(in_table.images)
    assert (files.cache.dir / PART).read_bytes() == (table.cache.dir / PART).read_bytes()
    trained = [train_run(config, Run(tmp_path / f"run-{n}")) for n, config in enumerate((files, table))]
    assert trained[0].train_loss == trained[1].train_loss
    scores = [evaluate(Run(tmp_path / f"run-{n}")) for n in range(2)]
    assert scores[1].questions == 18
    assert scores[0].accuracy_interval == scores[1].accuracy_interval  # by images, not by rows


def test_training_detects_an_edited_table_and_works_without_it(tables: Config) -> None:
    precompute(tables)
    path = Path(tables.data.splits["train"].dataset or "")
    before, times = path.read_bytes(), path.stat()
    assert open_split(tables, "train")
    edited = pq.read_table(path)
    answers = edited["answer"].to_pylist()
    pq.write_table(edited.set_column(edited.column_names.index("answer"), "answer", [answers[::-1]]), path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(PipelineError, match=r"train\.parquet \(data\.train\.dataset\) has changed since .* was made"):
        open_split(tables, "train")
    assert precompute(tables).encoded == 0
    record = open_split(tables, "train").text.record(0)
    assert record["answers"] == [answers[-1]]
    path.unlink()
    assert open_split(tables, "train")
    path.write_bytes(before)
    with pytest.raises(PipelineError, match=r"has changed since"):
        open_split(tables, "train")


def test_training_detects_another_slice_or_revision() -> None:
    names = [
        TableName("a/b"),
        TableName("a/b", revision="1"),
        TableName("a/b", split="train[:5]"),
        TableName("a/b", subset="x"),
    ]
    assert len({table_fingerprint(name) for name in names}) == 4
    assert table_fingerprint(TableName("nowhere.parquet")) is None


def test_cache_of_tables_is_repaired_and_reencoded(tables: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tables.cache.dir.parent)
    relative = {"train": SplitFiles(dataset="train.parquet"), "val": SplitFiles(dataset="val.parquet")}
    precompute(tables.model_copy(update={"data": tables.data.model_copy(update=relative)}))
    cache = tables.cache.dir
    monkeypatch.chdir("/")
    compared = reencode(cache, 5)
    assert (compared.reencoded, compared.mismatches) == (5, ())
    (cache / PART).write_bytes((cache / PART).read_bytes()[:-1])
    assert repair(cache).encoded == 24
    assert verify(cache).damage == []


def test_invalid_table_images_are_skipped_by_row(tables: Config) -> None:
    path = Path(tables.data.splits["train"].dataset or "")
    rows = pq.read_table(path).to_pylist()
    rows[4]["image"], rows[5]["image"] = None, {"bytes": b"<html>", "path": None}
    rows[9]["image"]["bytes"] = rows[9]["image"]["bytes"][:-30]
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(PipelineError, match=r"1 questions \(no image in this row: .*train\.parquet: row 4\)"):
        precompute(tables)
    skipping = tables.precompute.model_copy(update={"on_invalid": "skip"})
    summary = precompute(tables.model_copy(update={"precompute": skipping}))
    assert (summary.failed, summary.questions["train"]) == (3, 51)
    listed = (tables.cache.dir / FeatureReader(tables.cache.dir).attachment("skipped.jsonl")).read_text()
    assert [json.loads(line)["where"].rpartition(": ")[2] for line in listed.splitlines()] == [
        "row 4",
        "row 5",
        "row 9",
    ]


def test_table_images_compare_by_row() -> None:
    assert str(TableImage("t.parquet", 12, None)) == "t.parquet: row 12"  # type: ignore[arg-type]
