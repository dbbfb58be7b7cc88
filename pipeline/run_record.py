"""What a run was made of and what came out: `run.json`."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cache.reader import FeatureReader
from pipeline.config import Config
from pipeline.run_folder import RunFolder

LIBRARIES = ("blip2-vqa-pipeline", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "h5py", "numpy")


def begin_record(run: RunFolder, config: Config, features: FeatureReader, device: str, dtype: str) -> None:
    """Writes what the run is made of; of a run that is gone on with, anew."""
    manifest = features.manifest
    record = {
        "seed": config.train.seed,
        "device": device,
        "compute_dtype": dtype,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "cache": {
            "dir": str(config.cache.dir),
            "fingerprint": manifest.fingerprint,
            "spec": manifest.spec.to_attributes(),
            "images": manifest.rows,
            "questions": {split: text.questions for split, text in manifest.splits.items()},
            "sources": manifest.provenance.get("sources", {}),
        },
    }
    _write_json(record, run.record)


def end_record(run: RunFolder, summary: dict[str, Any]) -> None:
    """Adds what came out."""
    _write_json({**read_record(run), "summary": summary}, run.record)


def read_record(run: RunFolder) -> dict[str, Any]:
    """What is known of the run; nothing of one that never began."""
    found: dict[str, Any] = json.loads(run.record.read_text()) if run.record.is_file() else {}
    return found


def evaluations(run: RunFolder) -> list[dict[str, Any]]:
    """The summaries of what was evaluated, by split, without the adapter first."""
    found = [json.loads(path.read_text()) for path in sorted(run.path.glob("evaluation-*.json"))]
    return sorted(found, key=lambda one: (one["split"], one["adapter"]))


def _write_json(record: dict[str, Any], path: Path) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2))
    partial.replace(path)
