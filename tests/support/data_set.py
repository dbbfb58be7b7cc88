"""A small data set of rendered scenes, and a config over it."""

import json
import random
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image

from pipeline.blip2.embedded.scenes import draw_scene

SAVES_LORA_ONLY = pytest.mark.skipif(
    tuple(map(int, version("peft").split(".")[:2])) < (0, 21), reason="this peft does not save lora_only's biases"
)


PICTURES = 24


QUESTIONS_A_PICTURE = 3


def write_data_set(folder: Path, pictures: int = PICTURES, seed: int = 0) -> None:
    """`train.jsonl`, `val.jsonl` and `images/` of rendered scenes; three quarters of the pictures are for training."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True)
    lines: dict[str, list[str]] = {"train": [], "val": []}
    for number in range(pictures):
        scene = draw_scene(rng)
        Image.fromarray(scene.pixels).save(folder / "images" / f"{number}.png")
        thing = scene.things[0]
        asked = [("what shape is it?", thing.shape), ("what color is it?", thing.color), ("where is it?", thing.place)]
        for question, answer in asked:
            row = {"image": f"{number}.png", "question": question, "answer": answer}
            lines["val" if number % 4 == 3 else "train"].append(json.dumps(row))
    for split, rows in lines.items():
        (folder / f"{split}.jsonl").write_text("\n".join(rows))


def write_config(folder: Path, **sections: object) -> Path:
    """A config over the data set in `folder`, everything that it makes in `folder` too."""
    config = {
        "model": {"checkpoint": "embedded"},
        "data": {
            "format": "jsonl",
            "train": {"annotations": f"{folder}/train.jsonl", "images": f"{folder}/images"},
            "val": {"annotations": f"{folder}/val.jsonl", "images": f"{folder}/images"},
        },
        "cache": {"dir": f"{folder}/cache", "dtype": "float32"},
        "precompute": {"batch_size": 8, "num_workers": 0, "dtype": "float32"},
        "quantization": {"compute_dtype": "float32"},
        "lora": {"dropout": 0.0},
        "train": {"max_steps": 4, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 2, "logging_steps": 1,
                  "save_steps": 2, "output_dir": f"{folder}/runs"},
        "evaluate": {"split": "val", "metric": "exact"},
    }  # fmt: skip
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values} if isinstance(values, dict) else values
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path
