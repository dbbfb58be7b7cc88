"""What a run was made of and what came out: `run.json`."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cache.reader import FeatureReader
from pipeline.common.files import write_text
from pipeline.common.progress import log_info
from pipeline.config import Config
from pipeline.runs.run import Run

LIBRARIES = ("blip2-vqa-pipeline", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "h5py", "numpy")


def begin_record(run: Run, config: Config, features: FeatureReader, device: str, dtype: str) -> None:
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


def end_record(run: Run, summary: dict[str, Any]) -> None:
    """Adds what came out."""
    _write_json({**read_record(run), "summary": summary}, run.record)


def read_record(run: Run) -> dict[str, Any]:
    """What is known of the run; nothing of one that never began."""
    return _read_json(run.record) or {}


def evaluations(run: Run) -> list[dict[str, Any]]:
    """The summaries of what was evaluated, by split, without the adapter first."""
    read = [_read_json(path) for path in sorted(run.path.glob("evaluation-*.json"))]
    found = [one for one in read if one and {"split", "adapter"} <= one.keys()]
    return sorted(found, key=lambda one: (one["split"], one["adapter"]))


def read_evaluation(run: Run, split: str, with_adapter: bool) -> dict[str, Any] | None:
    """The summary of one evaluation; None if there is none."""
    return _read_json(run.evaluation(split, with_adapter))


def _read_json(path: Path) -> dict[str, Any] | None:
    """None if the file is not there, or, with a line of log, damaged: what it says is missed, and no more."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        log_info(f"{path}: damaged, skipped ({error})")
        return None
    if not isinstance(found, dict):
        log_info(f"{path}: damaged, skipped (not a JSON object)")
        return None
    return found


def _write_json(record: dict[str, Any], path: Path) -> None:
    write_text(path, json.dumps(record, indent=2))
