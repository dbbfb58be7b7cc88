"""Read and write `run.json`, the inputs and the summary of a run, and read its evaluations."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cache.reader import FeatureReader
from pipeline.common.files import write_text
from pipeline.common.progress import log_warning
from pipeline.config import Config
from pipeline.runs.run import Run

LIBRARIES = ("blip2-vqa-pipeline", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "h5py", "numpy")


def write_inputs(run: Run, config: Config, features: FeatureReader, device: str, dtype: str) -> None:
    """Write what the run is trained from; on resume, replace the record.

    Args:
        run: the run that starts or resumes.
        config: its config.
        features: its cache.
        device: the device type, such as `cuda`.
        dtype: the compute dtype in use, such as `bfloat16`.
    """
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


def write_summary(run: Run, summary: dict[str, Any]) -> None:
    """Add the summary to the record."""
    _write_json({**read_record(run), "summary": summary}, run.record)


def read_record(run: Run) -> dict[str, Any]:
    """Return the record of the run, empty if it never started."""
    return _read_json(run.record) or {}


def read_evaluations(run: Run) -> list[dict[str, Any]]:
    """Return the summaries of all evaluations by split, those without the adapter first."""
    summaries = [_read_json(path) for path in sorted(run.path.glob("evaluation-*.json"))]
    valid = [summary for summary in summaries if summary and {"split", "adapter"} <= summary.keys()]
    return sorted(valid, key=lambda summary: (summary["split"], summary["adapter"]))


def read_evaluation(run: Run, split: str, with_adapter: bool) -> dict[str, Any] | None:
    """Return the summary of one evaluation, None if there is none."""
    return _read_json(run.evaluation(split, with_adapter))


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if the file is missing, or damaged, which is logged."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        log_warning(f"{path}: damaged, skipped ({error})")
        return None
    if not isinstance(content, dict):
        log_warning(f"{path}: damaged, skipped (not a JSON object)")
        return None
    return content


def _write_json(record: dict[str, Any], path: Path) -> None:
    write_text(path, json.dumps(record, indent=2))
