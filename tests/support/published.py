"""Each data set's files as they are published, small: every field that is there, also those that no reader takes."""

import json
from pathlib import Path
from typing import Any

LICENSE = {"url": "http://creativecommons.org/licenses/by/4.0/", "name": "Creative Commons Attribution 4.0"}
INFO = {"description": "a made sample", "url": "http://visualqa.org", "version": "2.0", "year": 2017}


def _people(*answers: str) -> list[dict[str, Any]]:
    people = enumerate([*answers, *answers[:1] * (10 - len(answers))], start=1)
    return [{"answer": answer, "answer_confidence": "maybe", "answer_id": number} for number, answer in people]


def _vqav2_questions(subtype: str) -> dict[str, Any]:
    return {
        "info": INFO,
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "license": LICENSE,
        "data_subtype": subtype,
        "questions": [
            {"image_id": 458752, "question": "What is this photo taken looking through?", "question_id": 458752000},
            {"image_id": 458752, "question": "What position is this man playing?", "question_id": 458752001},
        ],
    }


VQAV2_ANNOTATIONS = {
    "info": INFO,
    "license": LICENSE,
    "data_subtype": "train2014",
    "annotations": [
        {
            "question_type": "what is this",
            "multiple_choice_answer": "net",
            "answers": _people("net", "netting", "mesh"),
            "image_id": 458752,
            "answer_type": "other",
            "question_id": 458752000,
        },
        {
            "question_type": "what",
            "multiple_choice_answer": "pitcher",
            "answers": _people("pitcher", "catcher"),
            "image_id": 458752,
            "answer_type": "other",
            "question_id": 458752001,
        },
    ],
    "data_type": "mscoco",
}

OKVQA_QUESTIONS = {
    "task_type": "Open-Ended",
    "data_subtype": "train2014",
    "data_type": "mscoco",
    "questions": [
        {"image_id": 51606, "question": "What is the hairstyle of the blond called?", "question_id": 516065},
        {"image_id": 81721, "question": "How old do you have to be in canada to do this?", "question_id": 817215},
    ],
    "info": INFO,
    "license": LICENSE,
}
OKVQA_ANNOTATIONS = {
    "annotations": [
        {
            "image_id": image,
            "answer_type": "other",
            "question_type": "four",
            "question_id": question,
            "answers": [one | {"raw_answer": one["answer"] + "s"} for one in _people(*answers)],
            "confidence": 3,
        }
        for image, question, answers in [(51606, 516065, ("pony tail", "braid")), (81721, 817215, ("18", "21"))]
    ],
    "data_subtype": "train2014",
    "data_type": "mscoco",
    "info": INFO,
    "license": LICENSE,
}

AOKVQA = [
    {
        "split": "train",
        "image_id": 299207,
        "question_id": "22MexNkBPpdZGX6sxbxVBH",
        "question": "What is the man by the bags awaiting?",
        "choices": ["skateboarder", "train", "delivery", "cab"],
        "correct_choice_idx": 3,
        "direct_answers": ["ride", "ride", "bus", "taxi", "travelling", "traffic", "taxi", "cab", "cab", "his ride"],
        "difficult_direct_answer": False,
        "rationales": ["A train would not be on the street.", "He waits for a cab."],
    },
    {
        "split": "train",
        "image_id": 82237,
        "question_id": "2BAjGYTtGqWFAM6ywJEWpb",
        "question": "How many people will dine at this table?",
        "choices": ["one", "two", "three", "four"],
        "correct_choice_idx": 0,
        "direct_answers": ["one"] * 9 + ["1"],
        "difficult_direct_answer": True,
        "rationales": ["There is one plate."],
    },
]

VIZWIZ = [
    {
        "answers": [{"answer_confidence": "yes", "answer": "basil leaves"}] * 6
        + [{"answer_confidence": "maybe", "answer": "basil"}] * 4,
        "image": "VizWiz_train_00000001.jpg",
        "question": "Can you tell me what is in this can please?",
        "answer_type": "other",
        "answerable": 1,
    },
    {
        "answers": [{"answer_confidence": "yes", "answer": "unanswerable"}] * 10,
        "image": "VizWiz_train_00000002.jpg",
        "question": "Is this enchilada sauce or is this tomatoes? Thank you.",
        "answer_type": "unanswerable",
        "answerable": 0,
    },
]

TEXTVQA = {
    "dataset_type": "train",
    "dataset_name": "textvqa",
    "dataset_version": "0.5.1",
    "data": [
        {
            "question": "what is the brand of this camera?",
            "image_id": "003a8ae2ef43b901",
            "image_classes": ["Cassette deck", "Printer"],
            "flickr_original_url": "https://farm2.staticflickr.com/1/a_o.jpg",
            "flickr_300k_url": "https://farm2.staticflickr.com/1/a_z.jpg",
            "image_width": 1024,
            "image_height": 664,
            "answers": ["dakota", "dakota", "clos culombu", "dakota digital"] + ["dakota"] * 6,
            "question_tokens": ["what", "is", "the", "brand", "of", "this", "camera"],
            "question_id": 34602,
            "set_name": "train",
        },
        {
            "question": "what does the small white text spell?",
            "image_id": "3a8ae2ef43b90103",
            "image_classes": ["Person"],
            "flickr_original_url": "https://farm2.staticflickr.com/1/b_o.jpg",
            "flickr_300k_url": "https://farm2.staticflickr.com/1/b_z.jpg",
            "image_width": 1024,
            "image_height": 768,
            "answers": ["copenhagen"] * 10,
            "question_tokens": ["what", "does", "the", "small", "white", "text", "spell"],
            "question_id": 34603,
            "set_name": "train",
        },
    ],
}

GQA = {
    "02930152": {
        "semantic": [
            {"operation": "select", "dependencies": [], "argument": "sky (2486325)"},
            {"operation": "verify color", "dependencies": [0], "argument": "dark"},
        ],
        "entailed": ["02930160", "02930158"],
        "equivalent": ["02930152"],
        "question": "Is the sky dark?",
        "imageId": "2354786",
        "isBalanced": True,
        "groups": {"global": None, "local": "06-sky_dark"},
        "answer": "yes",
        "semanticStr": "select: sky (2486325)->verify color: dark [0]",
        "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {"2": "2486325"}},
        "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
        "fullAnswer": "Yes, the sky is dark.",
    },
    "07333408": {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "wall (722332)"}],
        "entailed": [],
        "equivalent": ["07333408"],
        "question": "What is on the white wall?",
        "imageId": "n161313",
        "isBalanced": True,
        "groups": {"global": "", "local": "14-wall_on,s"},
        "answer": "pipe",
        "semanticStr": "select: wall (722332)",
        "annotations": {"answer": {"0": "722335"}, "question": {"4:6": "722332"}, "fullAnswer": {"1": "722335"}},
        "types": {"detailed": "relS", "semantic": "rel", "structural": "query"},
        "fullAnswer": "The pipe is on the wall.",
    },
}

LAVIS = [
    {
        "question_id": 262148001,
        "question": "What are the people doing?",
        "answer": ["spectating", "watching", "watching"],
        "image": "val2014/COCO_val2014_000000262148.jpg",
        "dataset": "vqa",
    },
    {"question": "What color is the clock?", "answer": "green", "image": "vg/VG_100K_2/1.jpg", "dataset": "vg"},
]

COCO_CAPTIONS = {
    "info": INFO,
    "licenses": [LICENSE | {"id": 3}],
    "images": [
        {
            "license": 3,
            "file_name": f"{image:012d}.jpg",
            "coco_url": f"http://images.cocodataset.org/train2017/{image:012d}.jpg",
            "height": 360,
            "width": 640,
            "date_captured": "2013-11-14 11:18:45",
            "flickr_url": "http://farm9.staticflickr.com/1/a_z.jpg",
            "id": image,
        }
        for image in (391895, 522418)
    ],
    "annotations": [
        {"image_id": 391895, "id": 770337, "caption": "A man with a red helmet on a small moped on a dirt road. "},
        {"image_id": 522418, "id": 681330, "caption": "A woman wearing a net on her head cutting a cake. "},
        {"image_id": 391895, "id": 771687, "caption": "Man riding a motor bike on a dirt road on the countryside."},
    ],
}

JSONL = [
    {"image": "a.png", "question": "what color?", "answer": "red", "question_id": 7, "note": "mine"},
    {"image": "b/c.png", "question": "how many?", "answers": ["2", "2", "3"], "answer_type": "number"},
]

TRAIN: dict[str, dict[str, Any]] = {
    "jsonl": {"annotations": JSONL},
    "vqav2": {"questions": _vqav2_questions("train2014"), "annotations": VQAV2_ANNOTATIONS},
    "okvqa": {"questions": OKVQA_QUESTIONS, "annotations": OKVQA_ANNOTATIONS},
    "aokvqa": {"annotations": AOKVQA},
    "vizwiz": {"annotations": VIZWIZ},
    "textvqa": {"annotations": TEXTVQA},
    "gqa": {"annotations": GQA},
    "lavis": {"annotations": LAVIS},
    "coco_captions": {"annotations": COCO_CAPTIONS},
}
"""Data set -> config key -> what stands in that file; of jsonl, the lines."""


def _without(records: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in names} for record in records]


TEST: dict[str, dict[str, Any]] = {
    "jsonl": {"annotations": _without(JSONL, "answer", "answers")},
    "vqav2": {"questions": _vqav2_questions("test-dev2015")},
    "aokvqa": {"annotations": _without(AOKVQA, "correct_choice_idx", "direct_answers", "rationales")},
    "vizwiz": {"annotations": _without(VIZWIZ, "answers", "answer_type", "answerable")},
    "textvqa": {"annotations": TEXTVQA | {"data": _without(TEXTVQA["data"], "answers")}},  # type: ignore[arg-type]
    "gqa": {
        "annotations": {
            key: {name: record[name] for name in ("isBalanced", "question", "imageId")}
            for key, record in GQA.items()  # type: ignore[attr-defined]
        }
    },
    "lavis": {"annotations": _without(LAVIS[:1], "answer")},
    "coco_captions": {"annotations": _without([COCO_CAPTIONS], "annotations")[0] | {"categories": []}},
}


def format_of(data_set: str) -> str:
    return "vqav2" if data_set == "okvqa" else data_set


def spell(data_set: str, content: Any) -> str:
    """The text of a file."""
    if data_set == "jsonl":
        return "".join(json.dumps(line) + "\n" for line in content)
    return json.dumps(content)


def write(folder: Path, data_set: str, files: dict[str, Any]) -> dict[str, Path]:
    """Writes the files, and tells the paths by config key."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {key: folder / f"{key}.json" for key in files}
    for key, content in files.items():
        paths[key].write_text(spell(data_set, content), encoding="utf-8")
    return paths
