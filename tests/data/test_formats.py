"""Read each published dataset format, and write predictions for its evaluation server."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import published
import pytest
from data_set import write_config

from pipeline.batches.split import load_tokenizer, open_split
from pipeline.commands.precompute import precompute
from pipeline.common.errors import ConfigError, PipelineError
from pipeline.config import load_config
from pipeline.data.examples import DIFFICULT, SkippedItem, Split, VQAExample
from pipeline.data.vqa import FORMATS, read_examples, results_formatter

FOLDER = Path("images")
CAPTIONS = [
    "A man with a red helmet on a small moped on a dirt road. ",
    "Man riding a motor bike on a dirt road on the countryside.",
    "A woman wearing a net on her head cutting a cake. ",
]

EXPECTED = {
    "vqav2": [
        VQAExample(
            458752000,
            FOLDER / "COCO_train2014_000000458752.jpg",
            "What is this photo taken looking through?",
            ("net", "netting", "mesh", *["net"] * 7),
            "other",
            "what is this",
        ),
        VQAExample(
            458752001,
            FOLDER / "COCO_train2014_000000458752.jpg",
            "What position is this man playing?",
            ("pitcher", "catcher", *["pitcher"] * 8),
            "other",
            "what",
        ),
    ],
    "okvqa": [
        VQAExample(
            516065,
            FOLDER / "COCO_train2014_000000051606.jpg",
            "What is the hairstyle of the blond called?",
            ("pony tail", "braid", *["pony tail"] * 8),
            "other",
            "four",
        ),
        VQAExample(
            817215,
            FOLDER / "COCO_train2014_000000081721.jpg",
            "How old do you have to be in canada to do this?",
            ("18", "21", *["18"] * 8),
            "other",
            "four",
        ),
    ],
    "aokvqa": [
        VQAExample(
            "22MexNkBPpdZGX6sxbxVBH",
            FOLDER / "000000299207.jpg",
            "What is the man by the bags awaiting?",
            ("ride", "ride", "bus", "taxi", "travelling", "traffic", "taxi", "cab", "cab", "his ride"),
            "direct answer",
        ),
        VQAExample(
            "2BAjGYTtGqWFAM6ywJEWpb",
            FOLDER / "000000082237.jpg",
            "How many people will dine at this table?",
            ("one",) * 9 + ("1",),
            DIFFICULT,
        ),
    ],
    "vizwiz": [
        VQAExample(
            "VizWiz_train_00000001.jpg",
            FOLDER / "VizWiz_train_00000001.jpg",
            "Can you tell me what is in this can please?",
            ("basil leaves",) * 6 + ("basil",) * 4,
            "other",
        ),
        VQAExample(
            "VizWiz_train_00000002.jpg",
            FOLDER / "VizWiz_train_00000002.jpg",
            "Is this enchilada sauce or is this tomatoes? Thank you.",
            ("unanswerable",) * 10,
            "unanswerable",
        ),
    ],
    "textvqa": [
        VQAExample(
            34602,
            FOLDER / "003a8ae2ef43b901.jpg",
            "what is the brand of this camera?",
            ("dakota", "dakota", "clos culombu", "dakota digital", *["dakota"] * 6),
        ),
        VQAExample(
            34603, FOLDER / "3a8ae2ef43b90103.jpg", "what does the small white text spell?", ("copenhagen",) * 10
        ),
    ],
    "gqa": [
        VQAExample("02930152", FOLDER / "2354786.jpg", "Is the sky dark?", ("yes",), "verify", "attr"),
        VQAExample("07333408", FOLDER / "n161313.jpg", "What is on the white wall?", ("pipe",), "query", "rel"),
    ],
    "lavis": [
        VQAExample(
            262148001,
            FOLDER / "val2014/COCO_val2014_000000262148.jpg",
            "What are the people doing?",
            ("spectating", "watching", "watching"),
        ),
        VQAExample(1, FOLDER / "vg/VG_100K_2/1.jpg", "What color is the clock?", ("green",)),
    ],
    "coco_captions": [
        VQAExample(391895, FOLDER / "000000391895.jpg", "", tuple(CAPTIONS[:2])),
        VQAExample(522418, FOLDER / "000000522418.jpg", "", tuple(CAPTIONS[2:])),
    ],
    "jsonl": [
        VQAExample(7, FOLDER / "a.png", "what color?", ("red",)),
        VQAExample(2, FOLDER / "b/c.png", "how many?", ("2", "2", "3"), "number"),
    ],
}


def read(folder: Path, data_set: str, files: Mapping[str, Any], split: str = "train") -> Split:
    paths = published.write(folder, data_set, dict(files))
    return read_examples(published.format_of(data_set), split, images=FOLDER, **paths)


@pytest.mark.parametrize("data_set", published.TRAIN)
def test_published_files_are_read(tmp_path: Path, data_set: str) -> None:
    assert read(tmp_path, data_set, published.TRAIN[data_set]) == (EXPECTED[data_set], [])


@pytest.mark.parametrize("data_set", published.TEST)
def test_published_test_split_has_no_answers(tmp_path: Path, data_set: str) -> None:
    examples, skipped = read(tmp_path, data_set, published.TEST[data_set], split="test")
    expected = EXPECTED[data_set][: len(examples)]
    assert skipped == []
    assert [example.answers for example in examples] == [()] * len(expected)
    assert [example.question_id for example in examples] == [example.question_id for example in expected]
    assert [example.question for example in examples] == [example.question for example in expected]


@pytest.mark.parametrize("data_set", sorted(published.TEST.keys() - {"vqav2", "coco_captions"}))
def test_test_split_read_as_train_is_skipped_with_positions(tmp_path: Path, data_set: str) -> None:
    with pytest.raises(PipelineError, match=r"skipped, the last one at .*annotations\.json: .*: no answer") as error:
        read(tmp_path, data_set, published.TEST[data_set])
    assert "looks like" not in str(error.value)


def test_train_split_requires_captions(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"annotations\.json: no field 'annotations'"):
        read(tmp_path, "coco_captions", published.TEST["coco_captions"])


def test_images_without_captions_and_captions_without_images_are_skipped(tmp_path: Path) -> None:
    annotations = [published.COCO_CAPTIONS["annotations"][0], {"image_id": 3, "id": 4, "caption": "A cat."}]
    examples, skipped = read(
        tmp_path, "coco_captions", {"annotations": published.COCO_CAPTIONS | {"annotations": annotations}}
    )
    assert [example.question_id for example in examples] == [391895]
    path = tmp_path / "annotations.json"
    assert skipped == [
        SkippedItem("train", "no answer", f"{path}: images[1]", 522418, "images/000000522418.jpg"),
        SkippedItem("train", "caption of an unlisted image", f"{path}: annotations[1]", 3, questions=0),
    ]


def test_duplicate_question_is_skipped_and_malformed_in_gqa(tmp_path: Path) -> None:
    _, skipped = read(tmp_path, "aokvqa", {"annotations": [*published.AOKVQA, published.AOKVQA[0]]})
    assert [(one.reason, one.where) for one in skipped] == [
        ("duplicate question_id", f"{tmp_path / 'annotations.json'}: [2]")
    ]
    path = tmp_path / "gqa.json"
    text = json.dumps(published.GQA).replace("07333408", "02930152")
    path.write_text(text)
    with pytest.raises(PipelineError, match=r"gqa\.json: duplicate key '02930152'"):
        read_examples("gqa", "train", annotations=path, images=FOLDER)


@pytest.mark.parametrize(
    ("data_set", "broken", "message"),
    [
        ("aokvqa", {"question_id": 3}, r"\[1\]: 'question_id' is an integer, not text"),
        ("aokvqa", {"image_id": "3"}, r"\[1\]: 'image_id' is text, not an integer"),
        ("aokvqa", {"difficult_direct_answer": "no"}, r"\[1\]: 'difficult_direct_answer' is text, not a boolean"),
        ("aokvqa", {"direct_answers": ["a", 3.5]}, r"\[1\]: 'direct_answers\[1\]' is a float, not"),
        ("vizwiz", {"answers": ["a"]}, r"\[1\]: expected an object, found text"),
        ("vizwiz", {"answers": [{"answer": True}]}, r"\[1\]: 'answer' is a boolean, not text; write"),
        ("lavis", {"answer": 3.5}, r"\[1\]: 'answer' is a float, not text"),
        ("lavis", {"answer": ["\ud800"]}, r"\[1\]: 'answer\[0\]' contains half of a surrogate pair"),
        ("lavis", {"question_id": "\ud800"}, r"\[1\]: 'question_id' contains half of a surrogate pair"),
        ("lavis", {"image": "../a.jpg"}, r"\[1\]: image '\.\./a\.jpg' does not name a file inside"),
    ],
)
def test_malformed_record_is_named(tmp_path: Path, data_set: str, broken: dict[str, object], message: str) -> None:
    records = published.TRAIN[data_set]["annotations"]
    with pytest.raises(PipelineError, match=rf"annotations\.json: {message}"):
        read(tmp_path, data_set, {"annotations": [records[0], records[1] | broken]})


@pytest.mark.parametrize(
    ("question_id", "image_id", "message"),
    [
        ("9", 3, "9: 'imageId' is an integer, not text"),
        ("\ud800", "3", ".*: 'question id' contains half of a surrogate pair"),
    ],
)
def test_malformed_gqa_question_is_named_by_its_id(
    tmp_path: Path, question_id: str, image_id: object, message: str
) -> None:
    broken = published.GQA | {question_id: {"imageId": image_id, "question": "what?", "answer": "a"}}
    with pytest.raises(PipelineError, match=rf"annotations\.json: {message}"):
        read(tmp_path, "gqa", {"annotations": broken})


def test_caption_follows_the_prompt_and_ends_with_the_end_token(data_set: Path) -> None:
    images = sorted(path.name for path in (data_set / "images").iterdir())[:4]
    captions = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(images)],
        "annotations": [{"image_id": number, "caption": f"a red ball {number} "} for number in range(4)],
    }
    (data_set / "captions.json").write_text(json.dumps(captions))
    files = {"annotations": f"{data_set}/captions.json", "images": f"{data_set}/images"}
    path = write_config(data_set, data={"format": "coco_captions", "train": files, "val": None})
    config = load_config(path)
    assert precompute(config).questions == {"train": 4}
    text, tokenizer = open_split(config, "train").text, load_tokenizer(config)

    def ids(words: str) -> list[int]:
        return list(tokenizer.tokenizer(words, add_special_tokens=False)["input_ids"])

    for number in range(4):
        assert list(text.prompt_ids[number]) == [tokenizer.bos_token_id, *ids("a photo of")]
        assert list(text.target_ids[number]) == [*ids(f" a red ball {number}"), tokenizer.eos_token_id]
    assert VQAExample.from_record(text.record(1)).question_id == 1


# ---- official results


@pytest.mark.parametrize(
    ("data_set", "expected"),
    [
        ("vqav2", [{"question_id": 458752000, "answer": "a"}, {"question_id": 458752001, "answer": "b"}]),
        ("textvqa", [{"question_id": 34602, "answer": "a"}, {"question_id": 34603, "answer": "b"}]),
        ("vizwiz", [{"image": f"VizWiz_train_0000000{n}.jpg", "answer": text} for n, text in [(1, "a"), (2, "b")]]),
        ("gqa", [{"questionId": "02930152", "prediction": "a"}, {"questionId": "07333408", "prediction": "b"}]),
        ("coco_captions", [{"image_id": 391895, "caption": "a"}, {"image_id": 522418, "caption": "b"}]),
        (
            "aokvqa",
            {"22MexNkBPpdZGX6sxbxVBH": {"direct_answer": "a"}, "2BAjGYTtGqWFAM6ywJEWpb": {"direct_answer": "b"}},
        ),
    ],
)
def test_predictions_have_the_form_of_the_evaluation_server(data_set: str, expected: object) -> None:
    found = results_formatter(data_set)(EXPECTED[data_set], ["a", "b"])
    assert json.loads(json.dumps(found)) == expected


@pytest.mark.parametrize("format", FORMATS)
def test_results_require_a_prediction_per_question(format: str) -> None:
    with pytest.raises(ValueError, match="zip"):
        results_formatter(format)(EXPECTED["vqav2"], ["a"])


def test_results_of_an_unknown_format_raise() -> None:
    with pytest.raises(ConfigError, match="did you mean gqa"):
        results_formatter("qga")
