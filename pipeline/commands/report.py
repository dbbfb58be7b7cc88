"""One HTML page about a run, or several side by side; all that it shows is inside it."""

import json
import math
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from cache.reader import FeatureReader
from cache.spec import CacheError
from pipeline.common.errors import PipelineError
from pipeline.common.files import followed_by, require_writable, write_text, writing
from pipeline.common.progress import log_info
from pipeline.config import SPLITS, Config, flatten, load_config
from pipeline.runs.gallery import gallery
from pipeline.runs.jsonl import read_jsonl
from pipeline.runs.record import read_evaluation, read_record
from pipeline.runs.run import Run, adapter_damage

PAGE = ("page.html", "page.css", "parts.js", "charts.js", "page.js")
POINTS = 1000
"""Of a curve, at most."""
LOOKS = 60
"""Columns of a heat map, at most."""

Rows = Sequence[dict[str, Any]]


def report(runs: Sequence[Run], output: Path | None = None, pictures: int = 200, seed: int = 0) -> dict[str, Any]:
    """Writes the page, and returns the summary.

    Args:
        runs: finished or not; of one alone the page shows examples, `pictures` of them chosen by `seed`.
        output: the page's file; by default `report.html`, in the run's folder if it is one.

    Raises `PipelineError` for a folder that is no run.
    """
    told = [_run(run) for run in runs]
    path = output or (runs[0].report if len(runs) == 1 else Path(runs[0].report.name))
    advice = "run the same command again; or name another file with --output"
    with followed_by(advice), writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        require_writable(path.parent)
    if path.is_dir():
        raise PipelineError(f"{path}: is a folder; name a file with --output")
    if len(runs) == 1:
        _add_details(runs[0], told[0], pictures, seed)
    title = told[0]["name"] if len(runs) == 1 else f"{len(runs)} runs compared"
    with followed_by(advice):
        write_text(path, page(title, {"runs": told}))
    shown = told[0].get("gallery") or {"examples": [], "pictures": {}}
    return {
        "report": str(path),
        "bytes": path.stat().st_size,
        "runs": len(runs),
        "examples": len(shown["examples"]),
        "pictures": len(shown["pictures"]),
        "missing": [f"{hint['words']} {hint['command']}".strip() for one in told for hint in one["hints"]],
    }


def page(title: str, content: dict[str, Any]) -> str:
    """The HTML; `content` is what the scripts draw."""
    folder = files("pipeline.runs") / "page"
    html, style, *scripts = ((folder / name).read_text(encoding="utf-8") for name in PAGE)
    # No text of a user's can end the element that the data stand in, or begin another.
    data = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    return Template(html).substitute(title=_escaped(title), style=style, script="\n".join(scripts), data=data)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _run(run: Run) -> dict[str, Any]:
    """What is told of every run."""
    if not run.config.is_file():
        raise PipelineError(f"{run.path}: not a run folder, it has no {run.config.name}; see `pipe train`")
    config = load_config(run.config)
    if run.adapter.is_dir() and (problem := adapter_damage(run.adapter)):
        log_info(problem)
    split, evaluation = _evaluation(run, config)
    metrics, record = read_jsonl(run.metrics), read_record(run)
    told = {
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
    return told | {"hints": _hints(run, told)}


def _hints(run: Run, told: dict[str, Any]) -> list[dict[str, str]]:
    """What the page lacks, and the command that makes it."""
    hints = []
    if told["state"] == "finished":
        if not told["evaluation"]["after"]:
            hints.append(_hint("outcome", "Not evaluated yet:", f"pipe evaluate {run.path}"))
        if not told["evaluation"]["before"]:
            words = "What it was before LoRA, for comparison:"
            hints.append(_hint("outcome", words, f"pipe evaluate {run.path} --adapter none"))
    else:
        hints.append(
            _hint("outcome", "Training has not ended. Goes on with it, if it was stopped:", run.resume_command)
        )
    if not told["validation"] and "val" in read_record(run).get("cache", {}).get("questions", {}):
        words = "Accuracy and loss on other questions while training goes on:"
        hints.append(_hint("curves", words, f"pipe train {run.config} validation.steps=500"))
    return hints


def _hint(place: str, words: str, command: str) -> dict[str, str]:
    """`place` is the section that it stands in."""
    return {"place": place, "words": words, "command": command}


def _add_details(run: Run, told: dict[str, Any], pictures: int, seed: int) -> None:
    """What is told of a run if the page is about it alone."""
    looks = read_jsonl(run.lora_updates)
    told["config"] = run.config.read_text(encoding="utf-8")
    told["watch"] = heat_maps(looks) if looks else None
    if not looks:
        words = "How far each LoRA matrix has moved, by layer:"
        told["hints"].append(_hint("watch", words, f"pipe train {run.config} train.lora_monitor_steps=50"))
    told["gallery"], hint = _gallery(run, told["split"], pictures, seed)
    if hint and told["state"] == "finished":
        told["hints"].append(hint)


def _gallery(run: Run, split: str, count: int, seed: int) -> tuple[dict[str, Any] | None, dict[str, str] | None]:
    """The examples, and what they lack."""
    if not count:
        return None, None
    if not run.predictions(split, True).exists():
        return None, _hint("gallery", "Questions with their pictures and answers:", f"pipe evaluate {run.path}")
    settings = load_config(run.config).cache
    precompute = f"pipe precompute {run.config}"
    try:
        with FeatureReader(settings.dir, settings.io) as features:
            found = gallery(run, features, split, count, seed)
    except CacheError as error:
        return None, _hint("gallery", f"The questions are in the cache, and it cannot be read: {error}", "")
    if not found:
        words = f"The cache's questions are not those that were answered on {split}:"
        return None, _hint("gallery", words, f"pipe evaluate {run.path}")
    if not found["pictures"]:
        return found, _hint("gallery", "The cache has no thumbnails; makes them, and encodes nothing:", precompute)
    return found, None


def _evaluation(run: Run, config: Config) -> tuple[str, dict[str, Any]]:
    """The split that the run is judged by, the config's or the first that was evaluated; its summaries."""
    splits = [config.evaluate.split, *SPLITS]
    split = next((one for one in splits if run.evaluation(one, True).exists()), config.evaluate.split)
    return split, {"after": read_evaluation(run, split, True), "before": read_evaluation(run, split, False)}


def _columns(rows: Rows) -> dict[str, list[Any]]:
    """The rows' values by key, None for what is not there or not finite, which JSON cannot say."""
    rows = _thinned(rows, POINTS)
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: [_finite(row.get(key)) for row in rows] for key in keys}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _thinned(rows: Rows, most: int) -> Rows:
    """Every so many-th row, and the last."""
    every = math.ceil(len(rows) / most) or 1
    return [row for place, row in enumerate(rows, start=1) if place % every == 0 or place == len(rows)]


def heat_maps(looks: Rows) -> dict[str, Any]:
    """Of `lora_updates.jsonl`: a map for each kind of matrix, with the layers as rows and the looks as columns."""
    shown = _thinned(looks, LOOKS)
    kinds: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for row in shown for name in row["matrices"]):
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    return {
        "steps": [row["step"] for row in shown],
        "maps": [_heat_map(kind, names, shown) for kind, names in sorted(kinds.items())],
        "warnings": [{"step": row["step"], "words": words} for row in looks for words in row.get("warnings", ())],
    }


def _heat_map(kind: str, names: Sequence[str], looks: Rows) -> dict[str, Any]:
    figures = {name: [row["matrices"].get(name, {}) for row in looks] for name in names}
    measures = dict.fromkeys(measure for row in figures.values() for figure in row for measure in figure)
    return {
        "module": kind,
        "layers": [_layer(name) for name in names],
        "values": {
            measure: [[figure.get(measure) for figure in figures[name]] for name in names] for measure in measures
        },
    }


def _layer(name: str) -> str:
    found = re.search(r"layers\.(\d+)\.", name)
    return found[1] if found else name
