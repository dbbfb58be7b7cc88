"""Reading a data set's annotations: seconds and memory of a fresh process.

    python tests/benchmarks/read_annotations.py --format vqav2 --questions 443757
    python tests/benchmarks/read_annotations.py --format gqa --questions 943000

The files are made, with as many different answers as VQAv2 has, and deleted afterwards; the two above take some 0.4 GB
and 1.2 GB. The numbers of questions are those of the train splits (of GQA, the balanced one).
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

READ = """
import resource, sys, time
from pathlib import Path

from pipeline.data.vqa import read_examples


def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


before = megabytes()
format, *files = sys.argv[1:]
paths = {Path(file).stem: Path(file) for file in files}
start = time.perf_counter()
examples, left_out = read_examples(format, "train", images=Path("pictures"), **paths)
seconds = time.perf_counter() - start
assert not left_out
print(f"{len(examples)} questions read in {seconds:.1f} s; {megabytes():.0f} MiB at most, {before:.0f} before")
"""
ANSWERS = 200_000
WORDS = [f"word{number}" for number in range(20_000)]


def made_answers(rng: random.Random) -> list[str]:
    return [" ".join(rng.choices(WORDS, k=rng.choice((1, 1, 2)))) for _ in range(ANSWERS)]


def write_items(path: Path, head: str, items: Iterator[str], tail: str) -> None:
    with path.open("w") as file:
        file.write(head)
        for number, item in enumerate(items):
            file.write(f"{', ' if number else ''}{item}")
        file.write(tail)


def make_vqav2(
    folder: Path, count: int, rng: random.Random, images: int | None = None, subtype: str = "train2014"
) -> list[Path]:
    """`count` questions on images numbered from 0, five on each or as many `images` as are told."""
    texts = made_answers(rng)
    images = images or -(-count // 5)

    def question(number: int) -> dict[str, Any]:
        text = f"what is the {' '.join(rng.choices(WORDS, k=4))}?"
        return {"image_id": number * images // count, "question": text, "question_id": number}

    def annotation(number: int) -> dict[str, Any]:
        common = rng.choice(texts)
        given = [common if rng.random() < 0.6 else rng.choice(texts) for _ in range(10)]
        answers = [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(given, 1)]
        types = {"question_type": "what is the", "answer_type": "other", "multiple_choice_answer": common}
        return types | {"answers": answers, "image_id": number * images // count, "question_id": number}

    paths = [folder / "questions.json", folder / "annotations.json"]
    for path, make in zip(paths, (question, annotation), strict=True):
        items = map(json.dumps, map(make, range(count)))
        write_items(path, f'{{"data_subtype": "{subtype}", "{path.stem}": [', items, "]}")
    return paths


def make_gqa(folder: Path, count: int, rng: random.Random) -> list[Path]:
    texts = made_answers(rng)[:1500]

    def question(number: int) -> dict[str, Any]:
        words = rng.choices(WORDS, k=5)
        steps = [{"operation": f"filter {word}", "dependencies": [i], "argument": word} for i, word in enumerate(words)]
        return {
            "semantic": steps,
            "entailed": [f"{number + i:08d}" for i in range(3)],
            "equivalent": [f"{number:08d}"],
            "question": f"What is the {' '.join(words)}?",
            "imageId": str(number // 13),
            "isBalanced": True,
            "groups": {"global": words[0], "local": f"13-{words[1]}"},
            "answer": rng.choice(texts),
            "semanticStr": "->".join(f"filter {word}: {word} [0]" for word in words),
            "annotations": {"answer": {}, "question": {"4": "1"}, "fullAnswer": {"1": "2"}},
            "types": {"detailed": "categoryRelS", "semantic": "rel", "structural": "query"},
            "fullAnswer": f"The {words[0]} is the {words[1]}.",
        }

    path = folder / "annotations.json"
    items = (f'"{number:08d}": {json.dumps(question(number))}' for number in range(count))
    write_items(path, "{", items, "}")
    return [path]


MAKERS: dict[str, Callable[[Path, int, random.Random], list[Path]]] = {"vqav2": make_vqav2, "gqa": make_gqa}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=MAKERS, default="vqav2")
    parser.add_argument("--questions", type=int, default=443_757)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to put the files for the time of the run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        paths = MAKERS[args.format](Path(name), args.questions, random.Random(0))
        print(f"{args.format}: {sum(path.stat().st_size for path in paths) / 1e9:.2f} GB of JSON")
        command = [sys.executable, "-c", READ, args.format, *map(str, paths)]
        root = str(Path(__file__).parents[2])
        for _ in range(args.rounds):
            subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": root})


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
