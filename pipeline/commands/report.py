"""Write a self-contained HTML page about one run, or a comparison of several."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from cache.reader import FeatureReader
from cache.spec import CacheError
from pipeline.common.errors import PipelineError
from pipeline.common.files import followed_by, require_writable, write_text, writing
from pipeline.common.progress import log_warning
from pipeline.common.result import Result
from pipeline.config import SPLITS, Config, flatten, load_config
from pipeline.runs.gallery import collect_gallery
from pipeline.runs.jsonl import read_jsonl
from pipeline.runs.record import read_evaluation, read_record
from pipeline.runs.run import Run, RunLike, adapter_damage

PAGE = ("page.html", "page.css", "parts.js", "charts.js", "page.js")
MAX_POINTS = 1000
"""Points of a curve."""
MAX_MEASUREMENTS = 60
"""Columns of a heat map."""

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class ReportResult(Result):
    """The summary of a report."""

    report: str
    """Path of the page."""
    bytes: int
    runs: int
    examples: int
    thumbnails: int
    missing: list[str]
    """Contents that the page lacks, each with the command that creates them."""


def report(
    runs: Sequence[RunLike],
    output: str | os.PathLike[str] | None = None,
    max_examples: int = 200,
    seed: int = 0,
) -> ReportResult:
    """Write a page about one run or several, finished or not.

    Args:
        runs: each a `Run`, the path of a run folder, or the result of `train`.
        output: the file to write; by default `report.html`, in the run folder for a single run.
        max_examples: number of example questions; only the page about a single run shows them.
        seed: selects the examples.

    Raises:
        PipelineError: a folder is not a run, or the file cannot be written.
    """
    found = [Run.of(run) for run in runs]
    contents = [_describe_run(run) for run in found]
    is_single = len(found) == 1
    path = Path(output) if output else found[0].report if is_single else Path(found[0].report.name)
    advice = "run the same command again; or name another file with --output"
    with followed_by(advice), writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        require_writable(path.parent)
    if path.is_dir():
        raise PipelineError(f"{path}: is a folder; name a file with --output")
    if is_single:
        _add_details(found[0], contents[0], max_examples, seed)
    title = contents[0]["name"] if is_single else f"{len(found)} runs compared"
    with followed_by(advice):
        write_text(path, render_page(title, {"runs": contents}))
    gallery = contents[0].get("gallery") or {"examples": [], "thumbnails": {}}
    return ReportResult(
        report=str(path),
        bytes=path.stat().st_size,
        runs=len(found),
        examples=len(gallery["examples"]),
        thumbnails=len(gallery["thumbnails"]),
        missing=[f"{hint['text']} {hint['command']}".strip() for content in contents for hint in content["hints"]],
    )


def render_page(title: str, content: dict[str, Any]) -> str:
    """Return the HTML page; its scripts draw `content`."""
    folder = files("pipeline.runs") / "page"
    html, style, *scripts = ((folder / name).read_text(encoding="utf-8") for name in PAGE)
    # Escaped, so that no text in the data can close the script element or open another.
    data = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    return Template(html).substitute(title=_escape(title), style=style, script="\n".join(scripts), data=data)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _describe_run(run: Run) -> dict[str, Any]:
    """Return what the page shows of every run."""
    if not run.config.is_file():
        raise PipelineError(f"{run.path}: not a run folder, it has no {run.config.name}; see `pipe train`")
    config = load_config(run.config)
    if run.adapter.is_dir() and (problem := adapter_damage(run.adapter)):
        log_warning(problem)
    split, evaluation = _read_evaluations(run, config)
    metrics, record = read_jsonl(run.metrics), read_record(run)
    content = {
        "name": run.path.resolve().name,
        "path": str(run.path),
        "state": "finished" if run.adapter.is_dir() else "unfinished",
        "data": config.data.format,
        "last_step": metrics[-1]["step"] if metrics else 0,
        "settings": dict(flatten(config.model_dump(mode="json"))),
        "training": record.get("summary", {}),
        "versions": record.get("versions", {}),
        "metrics": _columns(metrics),
        "validation": _columns(read_jsonl(run.validation)),
        "split": split,
        "evaluation": evaluation,
    }
    has_validation_split = "val" in record.get("cache", {}).get("questions", {})
    return content | {"hints": _hints(run, content, has_validation_split)}


def _hints(run: Run, content: dict[str, Any], has_validation_split: bool) -> list[dict[str, str]]:
    """Return what the page lacks, and the commands that create it."""
    hints = []
    if content["state"] == "finished":
        if not content["evaluation"]["after"]:
            hints.append(_hint("summary", "Not evaluated yet:", f"pipe evaluate {run.path}"))
        if not content["evaluation"]["before"]:
            text = "For the accuracy before LoRA:"
            hints.append(_hint("summary", text, f"pipe evaluate {run.path} --adapter none"))
    else:
        text = "Training is not finished. To resume it, if it was stopped:"
        hints.append(_hint("summary", text, run.resume_command))
    if not content["validation"] and has_validation_split:
        text = "For accuracy and loss on the validation split during training:"
        hints.append(_hint("curves", text, f"pipe train {run.config} validation.steps=500"))
    return hints


def _hint(section: str, text: str, command: str) -> dict[str, str]:
    """Return a hint for a section of the page."""
    return {"section": section, "text": text, "command": command}


def _add_details(run: Run, content: dict[str, Any], max_examples: int, seed: int) -> None:
    """Add what only the page about a single run shows."""
    measurements = read_jsonl(run.lora_updates)
    content["config"] = run.config.read_text(encoding="utf-8")
    content["lora_updates"] = heat_maps(measurements) if measurements else None
    if not measurements:
        text = "For the update of each LoRA matrix, by layer:"
        content["hints"].append(_hint("lora_updates", text, f"pipe train {run.config} train.lora_monitor_steps=50"))
    content["gallery"], hint = _gallery(run, content["split"], max_examples, seed)
    if hint and content["state"] == "finished":
        content["hints"].append(hint)


def _gallery(run: Run, split: str, max_examples: int, seed: int) -> tuple[dict[str, Any] | None, dict[str, str] | None]:
    """Return the examples, and a hint if they or their thumbnails are missing."""
    if not max_examples:
        return None, None
    if not run.predictions(split, True).exists():
        return None, _hint("gallery", "For example questions with their images:", f"pipe evaluate {run.path}")
    settings = load_config(run.config).cache
    try:
        with FeatureReader(settings.dir, settings.io) as features:
            gallery = collect_gallery(run, features, split, max_examples, seed)
    except CacheError as error:
        return None, _hint("gallery", f"Examples need the cache, which cannot be read: {error}", "")
    if not gallery:
        text = f"The predictions on {split} are for other questions than those in the cache:"
        return None, _hint("gallery", text, f"pipe evaluate {run.path}")
    if not gallery["thumbnails"]:
        text = "The cache has no thumbnails. To create them, without encoding any image again:"
        return gallery, _hint("gallery", text, f"pipe precompute {run.config}")
    return gallery, None


def _read_evaluations(run: Run, config: Config) -> tuple[str, dict[str, Any]]:
    """Return the split whose accuracy is shown, that of the config or the first evaluated one, and its summaries."""
    splits = [config.evaluate.split, *SPLITS]
    split = next((name for name in splits if run.evaluation(name, True).exists()), config.evaluate.split)
    return split, {"after": read_evaluation(run, split, True), "before": read_evaluation(run, split, False)}


def _columns(rows: Rows) -> dict[str, list[Any]]:
    """Return the values by key; None for those that are missing, or not finite, which JSON cannot represent."""
    rows = _subsample(rows, MAX_POINTS)
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: [_finite(row.get(key)) for row in rows] for key in keys}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _subsample(rows: Rows, max_rows: int) -> Rows:
    """Return evenly spaced rows, with the last one."""
    interval = math.ceil(len(rows) / max_rows) or 1
    return [row for number, row in enumerate(rows, start=1) if number % interval == 0 or number == len(rows)]


def heat_maps(measurements: Rows) -> dict[str, Any]:
    """Return a heat map per kind of LoRA matrix, with layers as rows and measurements as columns.

    Args:
        measurements: the rows of `lora_updates.jsonl`.
    """
    columns = _subsample(measurements, MAX_MEASUREMENTS)
    modules: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for row in columns for name in row["matrices"]):
        modules.setdefault(name.rpartition(".")[2], []).append(name)
    return {
        "steps": [row["step"] for row in columns],
        "maps": [_heat_map(module, names, columns) for module, names in sorted(modules.items())],
        "warnings": [
            {"step": row["step"], "text": warning} for row in measurements for warning in row.get("warnings", ())
        ],
    }


def _heat_map(module: str, names: Sequence[str], columns: Rows) -> dict[str, Any]:
    matrices = {name: [row["matrices"].get(name, {}) for row in columns] for name in names}
    measures = dict.fromkeys(measure for row in matrices.values() for cell in row for measure in cell)
    return {
        "module": module,
        "layers": [_layer(name) for name in names],
        "values": {measure: [[cell.get(measure) for cell in matrices[name]] for name in names] for measure in measures},
    }


def _layer(name: str) -> str:
    match = re.search(r"layers\.(\d+)\.", name)
    return match[1] if match else name
