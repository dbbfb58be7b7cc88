"""`pipe precompute` with nothing to do, at the size of VQAv2: seconds of a whole process, and of its phases.

    python tests/benchmarks/precompute_again.py
    python tests/benchmarks/precompute_again.py --scale 0.05 --profile profile.out

Made up are 82,783 and 40,504 JPEGs (12 KB each, all different: a comment in them counts), and 443,757 and 214,354
questions in VQAv2's form with ten answers each. The cache is filled without the encoder, with zeros and with one
thumbnail again and again, since what is timed looks at neither. Everything is deleted afterwards. The first process
makes the tokens, the others find all of it there.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from read_annotations import make_vqav2

from cache.part import PartWriter
from cache.text import Ragged
from cache.thumbnails import Thumbnails
from cache.writer import FeatureWriter
from pipeline.blip2.device import dtype_name, pick_device, pick_dtype
from pipeline.blip2.embedded import embedded_checkpoint
from pipeline.config import load_config
from pipeline.encoding.dataset_scan import scan_dataset
from pipeline.encoding.encoder_spec import encoder_spec
from pipeline.encoding.images import thumbnail

SPLITS = {"train": ("train2014", 82_783, 443_757), "val": ("val2014", 40_504, 214_354)}
JPEGS = 16  # different ones, before the comments
ROOT = Path(__file__).parents[2]


def jpeg(seed: int) -> bytes:
    """Some 12 KB, 320 x 240."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8))
    file = BytesIO()
    small.resize((320, 240), Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
    return file.getvalue()


def with_comment(data: bytes, text: bytes) -> bytes:
    """The same picture in a file that differs."""
    return data[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + data[2:]


def make_data(folder: Path, scale: float) -> Path:
    """The pictures, the questions and a config over them."""
    pictures = [jpeg(seed) for seed in range(JPEGS)]
    data = {}
    for split, (subtype, images, questions) in SPLITS.items():
        images, questions = int(images * scale), int(questions * scale)
        (folder / split).mkdir()
        for number in range(images):
            content = with_comment(pictures[number % JPEGS], f"{split} {number}".encode())
            (folder / split / f"COCO_{subtype}_{number:012d}.jpg").write_bytes(content)
        (folder / f"{split}_text").mkdir()
        asked, answered = make_vqav2(folder / f"{split}_text", questions, random.Random(0), images, subtype)
        data[split] = {"questions": str(asked), "annotations": str(answered), "images": str(folder / split)}
    config = folder / "config.yaml"
    values = {
        "model": {"checkpoint": "embedded"},
        "data": {"format": "vqav2", **data},
        "cache": {"dir": str(folder / "cache")},
    }
    config.write_text(json.dumps(values))
    return config


def fill_cache(path: Path) -> None:
    """Every row that the config's pictures need, as zeros; the thumbnails of all are one picture."""
    config = load_config(path)
    dtype = dtype_name(pick_dtype(config.precompute.dtype, pick_device()))
    spec = encoder_spec(embedded_checkpoint(), dtype, config.cache.dtype)
    longer_side = config.precompute.thumbnail_size
    shown = thumbnail(jpeg(0), longer_side)
    with FeatureWriter(
        config.cache.dir, spec, list(scan_dataset(config.data).images), config.cache.part_rows
    ) as writer:
        for part_path in writer.parts:
            with PartWriter(part_path) as part:
                rows = part.unwritten_rows
                part.write(rows, np.zeros((len(rows), spec.query_tokens, spec.width), spec.storage_dtype))
                part.seal()
        for part, digests in writer.images().items():
            Thumbnails(digests, Ragged.from_rows([shown] * len(digests), np.uint8), longer_side).save(
                config.cache.dir, part
            )


def timed(config: Path, profile: Path | None = None) -> None:
    """Runs the command as a process of its own and prints its time, its CPU time and its phases."""
    measure = ["-m", "cProfile", "-o", str(profile)] if profile else []
    code = [*measure, str(Path(sys.executable).with_name("pipe")), "precompute", str(config), "--json"]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *code], check=True, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    summary = json.loads(done.stdout)
    assert summary["encoded"] == 0, "nothing was encoded"
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in summary["time"].items() if seconds >= 0.05)
    print(f"{wall:6.1f} s, of CPU {user + system:6.1f} s ({user:.1f} user, {system:.1f} system); {phases}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of pictures and questions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", type=Path, help="where to put a profile of one more round")
    parser.add_argument("--folder", type=Path, help="where to put the data; data that is there is used, and kept")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    try:
        config = folder / "config.yaml"
        if not config.exists():
            folder.mkdir(exist_ok=True)
            config = make_data(folder, options.scale)
            fill_cache(config)
            timed(config)
        for _ in range(options.rounds):
            timed(config)
        if options.profile:
            timed(config, options.profile)
    finally:
        if not options.folder:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
