"""Write a small dataset of rendered scenes, and a config for it."""

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


NUM_IMAGES = 24


def write_data_set(folder: Path, num_images: int = NUM_IMAGES, seed: int = 0) -> None:
    """Write `train.jsonl`, `val.jsonl` (a quarter of the images) and `images/`, with three questions per image."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True)
    lines: dict[str, list[str]] = {"train": [], "val": []}
    for number in range(num_images):
        scene = draw_scene(rng)
        Image.fromarray(scene.pixels).save(folder / "images" / f"{number}.png")
        thing = scene.things[0]
        asked = [("what shape is it?", thing.shape), ("what color is it?", thing.colour), ("where is it?", thing.place)]
        for question, answer in asked:
            row = {"image": f"{number}.png", "question": question, "answer": answer}
            lines["val" if number % 4 == 3 else "train"].append(json.dumps(row))
    for split, rows in lines.items():
        (folder / f"{split}.jsonl").write_text("\n".join(rows))


def write_config(folder: Path, **sections: object) -> Path:
    """Write a config for the dataset in `folder`, with the cache and runs in `folder` too; `sections` override it."""
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
