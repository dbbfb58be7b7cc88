"""Checkpoints in the forms that the hub has."""

import json
from pathlib import Path

from pipeline.blip2.checkpoint import INDEX


def shards_of(folder: Path, half: tuple[str, ...]) -> set[str]:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    return {shard for name, shard in weight_map.items() if name.startswith(half)}
