"""Custom datasets as spreadsheets and scripts write them: a JSON list, CSV, TSV."""

import json
from pathlib import Path

import pytest

from pipeline.common.errors import PipelineError
from pipeline.data.examples import Split
from pipeline.data.vqa import read_examples

IMAGES = Path("images")
ROWS = [
    {"image": "a.png", "question": "what, exactly; is it?", "answer": "red"},
    {"image": "b.png", "question": 'the "big" one?', "answer": "2"},
]


def read(path: Path, split: str = "train") -> Split:
    return read_examples("jsonl", split, annotations=path, images=IMAGES)


def written(folder: Path, text: str | bytes, name: str = "train.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def table(delimiter: str, end: str = "\n") -> str:
    lines = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in line] for line in lines]
    return end.join(delimiter.join(line) for line in quoted)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("before", ["", "\ufeff", "sep={}\r\n", "\ufeffsep={}\n"])
@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.txt", "train.jsonl"])
def test_spreadsheet_exports_are_read(tmp_path: Path, delimiter: str, end: str, before: str, name: str) -> None:
    text = before.format(delimiter) + table(delimiter, end) + end
    found = read(written(tmp_path, text, name)).examples
    assert [(str(one.image), one.question, one.answers) for one in found] == [
        (f"images/{row['image']}", row["question"], (row["answer"],)) for row in ROWS
    ]
    first = 3 if "sep" in before else 2
    assert [one.question_id for one in found] == [first, first + 1]


def test_optional_columns_and_empty_cells(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "Question_ID, Image ,question,ANSWERS,answer,answer_type,,note\n"
        """7,a.png,one?,"[""red"", ""blue""]",,color,,x\n"""
        """a8,b.png,two?,"['red', '', 3]",green,,,\n"""
        ",,,,,,,\n"
        "009,c.png,three?,plain,green,,,\n"
        ",d.png,four?,,green,,,\n",
    )
    found = read(path).examples
    assert [(one.question_id, one.answers, one.answer_type) for one in found] == [
        (7, ("red", "blue"), "color"),
        ("a8", ("red", "", "3"), None),
        ("009", ("plain",), None),
        (6, ("green",), None),
    ]


def test_quoted_text_may_have_several_lines(tmp_path: Path) -> None:
    path = written(tmp_path, 'image,question,answer\na.png,"one\nor two?",red\nb.png,what?,\n')
    found = read(path)
    assert [(one.question_id, one.question) for one in found.examples] == [(2, "one\nor two?")]
    assert [one.where for one in found.skipped] == [f"{path}: line 4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "image,question,answer\na.png,what, now?,red",
            r"line 2: 4 cells, but the header has 3; quote texts",
        ),
        ("image,question,answer\na.png,what?", r"line 2: 2 cells, but the header has 3"),
        ('image,question,answer\na.png,"what?,red\n' * 2, r"line \d: not a valid table row: .*quote"),
        ("image,question,image\na.png,what?,red", r"line 1: the column 'image' occurs several times"),
        (
            "image,question,answers\na.png,what?,[red",
            r"line 2: column 'answers' begins like a list but cannot .*: \[red",
        ),
        ("image,question,answer\n../a.png,what?,red", r"line 2: image '\.\./a\.png' does not name a file inside"),
        ("image,text\na.png,what?", r"no columns image and question; its columns are image, text"),
        ("hello", r"no columns image and question; it has no header line"),
        ("", r"no columns image and question; it has no header line"),
        (b"image,question,answer\na.png,gro\xdf?,red", r"not UTF-8 at byte 31; save it as UTF-8"),
    ],
)
def test_invalid_table_is_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(PipelineError, match=rf"train\.csv: {message}"):
        read(path)


@pytest.mark.parametrize("indent", [None, 2])
def test_json_list_is_read(tmp_path: Path, indent: int | None) -> None:
    rows = [{**ROWS[0], "question_id": "x"}, ROWS[1], {"image": "c.png", "question": "none?"}]
    path = written(tmp_path, json.dumps(rows, indent=indent), "train.json")
    found = read(path)
    assert [(one.question_id, one.answers) for one in found.examples] == [("x", ("red",)), (1, ("2",))]
    assert [one.where for one in found.skipped] == [f"{path}: [2]"]


@pytest.mark.parametrize(
    ("fields", "answers"),
    [
        ({"answer": 2}, ("2",)),
        ({"answer": ["red", 2]}, ("red", "2")),
        ({"answers": "red"}, ("red",)),
        ({"answers": 0}, ("0",)),
        ({"answers": None, "answer": "red"}, ("red",)),
        ({"answer": -3}, ("-3",)),
    ],
)
def test_integers_and_single_answers_are_read(
    tmp_path: Path, fields: dict[str, object], answers: tuple[str, ...]
) -> None:
    path = written(tmp_path, json.dumps({"image": "a.png", "question": "how many?", **fields}), "train.jsonl")
    assert read(path).examples[0].answers == answers


@pytest.mark.parametrize("fields", [{"answer": None}, {"answer": " "}, {"answers": ["", "\u3000"]}, {}])
def test_empty_cell_is_not_an_answer(tmp_path: Path, fields: dict[str, object]) -> None:
    line = json.dumps({"image": "a.png", "question": "how many?", **fields})
    path = written(tmp_path, f"{json.dumps(ROWS[0])}\n{line}", "train.jsonl")
    assert [(one.reason, one.where) for one in read(path).skipped] == [("no answer", f"{path}: line 2")]
    assert read(path, "test").examples[1].answers == ()
