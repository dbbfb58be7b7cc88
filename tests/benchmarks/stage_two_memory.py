"""Compare the memory that `pipe train --dry-run` estimates with what `pipe train` takes.

    python tests/benchmarks/stage_two_memory.py --size blip2-opt-2.7b --steps 2

The checkpoint has the real size and random weights, the cache random features and synthetic questions. At 2.7b it takes
8 GB of disk, deleted at the end unless --folder is given.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from transformers import BlipImageProcessorPil

from cache.part import PartWriter
from cache.text import Ragged, TextTable
from cache.writer import FeatureWriter
from pipeline.batches.random_questions import make_questions
from pipeline.blip2.embedded import embedded_checkpoint
from pipeline.blip2.random_checkpoint import SIZES, config_of, write_random_checkpoint
from pipeline.data.text import PromptTokenizer
from pipeline.encoding.encoder_spec import encoder_spec

PROMPT = "Question: {question} Answer:"


def make_cache(folder: Path, checkpoint: Path, size: str, questions: int) -> None:
    """Write a cache of random features with the questions of `pipe benchmark`."""
    asked = make_questions(questions, config_of(size))
    images = sorted({one.image for one in asked})
    digests = [np.random.default_rng(image).bytes(32) for image in images]
    spec = encoder_spec(checkpoint, "bfloat16", "float16")
    with FeatureWriter(folder, spec, digests) as writer:
        for path in writer.parts:
            with PartWriter(path) as part:
                features = np.random.default_rng(0).normal(size=(len(images), spec.query_tokens, spec.width))
                part.write(part.unwritten_rows, features.astype("<f2"))
                part.seal()
        rows = writer.rows()
        text = TextTable(
            records=Ragged.from_rows([b'{"question": "?", "image": "x", "answers": ["y"]}'] * len(asked), np.uint8),
            image_row=np.array([rows[digests[images.index(one.image)]] for one in asked]),
            prompt_ids=Ragged.from_rows([one.prompt for one in asked], np.int32),
            target_ids=Ragged.from_rows([one.target for one in asked], np.int32),
            prompt=PROMPT,
            tokenizer=PromptTokenizer(checkpoint, PROMPT).fingerprint(),
        )
        writer.finish({"train": text})


def make_checkpoint(folder: Path, size: str) -> Path:
    checkpoint = folder / size
    if not checkpoint.exists():
        write_random_checkpoint(checkpoint, size)
    for path in embedded_checkpoint().glob("*tokenizer*.json"):  # any tokenizer will do: the cache holds the tokens
        shutil.copy(path, checkpoint)
    processor = BlipImageProcessorPil.from_pretrained(embedded_checkpoint())
    side = config_of(size).vision_config.image_size
    processor.size = {"height": side, "width": side}
    processor.save_pretrained(checkpoint)
    return checkpoint


def pipe(*words: str) -> dict[str, object]:
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES], default="blip2-opt-2.7b")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--questions", type=int, default=64, help="per step")
    parser.add_argument("--folder", type=Path, help="keep the random weights here for the next run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_intermixed_args()
    with TemporaryDirectory() as name:
        work = Path(name)
        checkpoint = make_checkpoint(args.folder or work, args.size)
        make_cache(work / "cache", checkpoint, args.size, args.questions * args.steps)
        config = work / "config.yaml"
        config.write_text(json.dumps({
            "model": {"checkpoint": str(checkpoint)},
            "data": {"train": {}},
            "cache": {"dir": str(work / "cache")},
            "train": {"batch_size": args.questions, "max_steps": args.steps, "output_dir": str(work / "runs")},
        }))  # fmt: skip
        estimate = pipe("train", str(config), "--dry-run", *args.overrides)
        measured = pipe("train", str(config), *args.overrides)
    memory, peak = estimate["memory_bytes"], measured["peak_memory_bytes"]
    print(json.dumps({"estimate": estimate, "measured": measured}, indent=1))
    total = memory["total"]
    print(f"estimated {total / 1e9:.2f} GB, measured {peak / 1e9:.2f} GB, ratio {total / peak:.3f}")
    print(f"measured beyond the 4-bit weights: {(peak - memory['weights']) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
