"""Adapters for commands that do not return a `Result` yet. Removed when all do."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import click

from pipeline.common.errors import PipelineError
from pipeline.common.result import Result
from pipeline.common.terminal import expand_home


class Summary(Result):
    values: dict[str, Any]

    def __init__(self, values: dict[str, Any]) -> None:
        object.__setattr__(self, "values", values)

    @property
    def exit_status(self) -> int:
        return int(bool(self.values.get("damaged") or self.values.get("failed_runs")))

    def to_dict(self) -> dict[str, Any]:
        return dict(self.values)


def wrapped(values: Any) -> Any:
    return Summary(values) if isinstance(values, dict) else values


def quickstart(overrides: tuple[str, ...]) -> Result | None:
    from pipeline.commands.quickstart import quickstart

    return wrapped(quickstart(overrides))


def train_command(config: Path, overrides: Sequence[str], name: str | None, resume: bool, dry_run: bool) -> Any:
    from pipeline.config import Config, load_config
    from pipeline.overrides import combinations_of
    from pipeline.runs.run import Run, named_run, next_run

    combinations, fixed = combinations_of(overrides, Config)
    is_grid = len(combinations) > 1
    if is_grid and dry_run:
        raise click.UsageError("--dry-run foretells one training: give each key one value")
    if resume and not name and (is_grid or not config.is_dir()):
        raise click.UsageError("--resume goes on with a run: give its folder in place of CONFIG, or its --name")
    resumed = Run(config) if resume and not name else None
    loaded = load_config(resumed.config if resumed else config, fixed)
    folder = loaded.train.output_dir
    run = resumed or (named_run(folder, name) if name else next_run(folder, config.stem))
    if is_grid:
        from pipeline.commands.grid import train_grid

        return wrapped(train_grid(config, combinations, fixed, run, resume))
    if dry_run:
        from pipeline.training.estimate import estimate_training

        return wrapped(estimate_training(loaded))
    from pipeline.commands.train import train

    return wrapped(train(loaded, run, resume))


def evaluate(run: Path, overrides: Sequence[str], with_adapter: bool) -> Result | None:
    from pipeline.commands.evaluate import evaluate
    from pipeline.runs.run import Run

    return wrapped(evaluate(Run(run), tuple(overrides), with_adapter))


def report(runs: Sequence[Path], output: Path | None, max_examples: int, seed: int) -> Result | None:
    from pipeline.commands.report import report
    from pipeline.runs.run import Run

    return wrapped(report([Run(run) for run in runs], output, max_examples, seed))


def export(run: Path, destination: Path, overrides: tuple[str, ...], merge: bool, push: str | None) -> Result | None:
    from pipeline.commands.export import export
    from pipeline.runs.run import Run

    return wrapped(export(Run(run), destination, overrides, merge, push))


def benchmark(size: str, questions: int, turns: int, folder: Path | None, plot: Path | None) -> Result | None:
    from pipeline.commands.benchmark import benchmark, draw
    from pipeline.common.files import require_writable

    if plot:
        require_writable(plot.parent)
    summary = benchmark(size, questions, turns, folder)
    if plot:
        draw(summary, plot)
    return wrapped(summary)


def ask(
    run: Path,
    image: Path | None,
    question: str | None,
    overrides: Sequence[str],
    with_adapter: bool,
    as_json: bool,
    output: TextIO,
) -> Result | None:
    from pipeline.commands import ask as asking
    from pipeline.runs.run import Run

    how = tuple(overrides), with_adapter
    if image and question is not None:
        return wrapped(asking.ask(Run(run), expand_home(image), question, *how))
    answers = _Answers(output, as_json)
    conversation = asking.Conversation(Run(run), *how, answers.tell)
    if not sys.stdin.isatty():
        _hear_lines(conversation, image, answers)
        return None
    line = str(image) if image else _typed(conversation.awaits)
    while line:
        conversation.hear(line)
        line = _typed(conversation.awaits)
    return None


class _Answers:
    def __init__(self, stdout: TextIO, as_json: bool) -> None:
        self.stdout, self.as_json = stdout, as_json
        self.told = 0

    def tell(self, answer: dict[str, Any]) -> None:
        self.told += 1
        print(json.dumps(answer) if self.as_json else answer["answer"] or "", file=self.stdout, flush=True)


def _hear_lines(conversation: Any, image: Path | None, answers: _Answers) -> None:
    if image:
        _show_first(conversation, expand_home(image))
    unanswered = 0
    for number, data in enumerate(sys.stdin.buffer):
        line = data.decode("utf-8-sig" if number == 0 else "utf-8", "replace").strip()
        before = answers.told
        unanswered += bool(line) and not conversation.hear(line)
        if answers.told == before:
            problem = conversation.problem if line else ""
            answers.tell({"line": line, "answer": None} | ({"error": problem} if problem else {}))
    if unanswered:
        raise PipelineError(f"{unanswered} lines were not answered; what was wrong with each is told above")


def _show_first(conversation: Any, image: Path) -> None:
    from pipeline.encoding.images import ImageError

    try:
        conversation.show(image)
    except ImageError as error:
        raise PipelineError(f"{image}: {error}") from None


def _typed(prompt: str) -> str:
    try:
        return input(f"{prompt}: " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
