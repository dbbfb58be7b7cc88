"""A run folder: what lies where in it."""

import glob
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open

from cache.files import TEMPORARY
from cache.lock import LOCK_NAME, FolderLock, holder, require_free
from cache.spec import CacheError
from pipeline.common.errors import ConfigError, PipelineError
from pipeline.common.files import append_line, require_utf8, write_text, writing
from pipeline.common.progress import log_info
from pipeline.config import Config, load_config
from pipeline.runs.checkpoints import complete_checkpoints

_LENGTHS = ("train.max_steps: ", "train.epochs: ")
NOT_TRAINED_ANEW = ("lora", "train", "validation")


class HasRun(Protocol):
    """A result that names its run, such as `TrainResult`."""

    @property
    def run(self) -> str:
        """The path of the run folder."""


@dataclass(frozen=True)
class Run:
    """One training run on disk."""

    path: Path

    @classmethod
    def of(cls, source: "RunLike") -> "Run":
        """Return the run that `source` stands for: a `Run`, the path of its folder, or a result with `.run`."""
        if isinstance(source, Run):
            return source
        return cls(Path(source if isinstance(source, str | os.PathLike) else source.run))

    @property
    def config(self) -> Path:
        """The resolved config, YAML."""
        return self.path / "config.yaml"

    @property
    def record(self) -> Path:
        """What the run was made of and what came out, JSON."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a logged step, with `step` and `loss`."""
        return self.path / "metrics.jsonl"

    @property
    def validation(self) -> Path:
        """One JSON object a look at the validation questions."""
        return self.path / "validation.jsonl"

    @property
    def watch(self) -> Path:
        """One JSON object a look at the LoRA weights."""
        return self.path / "lora_updates.jsonl"

    @property
    def report(self) -> Path:
        """The page that `pipe report` makes."""
        return self.path / "report.html"

    @property
    def adapter(self) -> Path:
        """The adapter in PEFT's form, the best one where training was validated; there when training has ended."""
        return self.path / "adapter"

    @property
    def last_adapter(self) -> Path:
        """That of the last step, where the best one is another."""
        return self.path / "adapter-last"

    def best(self, step: int) -> Path:
        """The adapter of a step that was the best so far, while training goes on."""
        return self.path / "best" / f"step-{step}"

    @property
    def checkpoints(self) -> Path:
        """What a killed run resumes from."""
        return self.path / "checkpoints"

    def results(self, split: str, with_adapter: bool) -> Path:
        """The answers to one split, in the data set's official form."""
        return self.path / f"results-{_evaluated(split, with_adapter)}.json"

    def predictions(self, split: str, with_adapter: bool) -> Path:
        """The same with each one's accuracy and probability, JSON lines in the order of the split."""
        return self.path / f"predictions-{_evaluated(split, with_adapter)}.jsonl"

    def evaluation(self, split: str, with_adapter: bool) -> Path:
        """The summary of the answers to one split, JSON."""
        return self.path / f"evaluation-{_evaluated(split, with_adapter)}.json"

    def mistakes(self, split: str, with_adapter: bool) -> Path:
        """Wrong answers to one split, JSON lines."""
        return self.path / f"mistakes-{_evaluated(split, with_adapter)}.jsonl"

    @property
    def resume_command(self) -> str:
        """The command that goes on with the run."""
        return f"pipe train {self.path} --resume"

    @property
    def is_unstarted(self) -> bool:
        """Whether nothing is there, or nothing but what a start that failed leaves."""
        if not self.path.is_dir():
            return not self.path.exists()
        left = (LOCK_NAME, self.checkpoints.name, self.config.with_suffix(".partial").name)
        own = all(path.name in left or path.name.endswith(TEMPORARY) for path in self.path.iterdir())
        return own and not any(self.checkpoints.glob("*"))

    def discard_unstarted(self) -> None:
        """Remove the folder if training has not begun in it."""
        if self.path.is_dir() and self.is_unstarted:
            shutil.rmtree(self.path, ignore_errors=True)

    def check_new(self) -> None:
        require_utf8(self.path)
        if not self.is_unstarted:
            go_on = f", or go on with it by `{self.resume_command}`" if self.config.is_file() else ""
            raise PipelineError(f"{self.path}: this run exists already; give another --name{go_on}")

    def check_resumable(self, config: Config) -> None:
        if not self.config.is_file():
            advice = "start it without --resume" if self.is_unstarted else "give another --name"
            raise PipelineError(f"{self.path}: nothing to resume, no run was started there; {advice}")
        changed = config.differences(load_config(self.config))
        longer = [line for line in changed if line.startswith(_LENGTHS)]
        advice = ""
        if longer:
            wanted = " ".join(line.partition(",")[0].replace(": ", "=").replace("None", "null") for line in longer)
            advice = (
                "\nThe learning rate follows the length from the first step on, so a training of another length is "
                f"another run, on the same cache: pipe train {self.config} {wanted} --name ANOTHER"
            )
        if self.adapter.is_dir():
            raise PipelineError(f"{self.path}: this run is finished already; see `pipe evaluate {self.path}`{advice}")
        if changed:
            lines = "\n  ".join(changed)
            raise PipelineError(f"{self.path}: the run was started with other settings:\n  {lines}{advice}")

    def hold(self) -> FolderLock:
        """Keeps other processes from training into the folder. Raises `PipelineError` that says which one does."""
        try:
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                return FolderLock(self.path)
        except CacheError:
            raise PipelineError(
                f"{self.path}: {holder(self.path)} is training this run; wait for it, or give another --name"
            ) from None

    def start(self, config: Config) -> None:
        """Make the folder, with its config; of a run that is gone on with, keep what was there."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config, config.to_yaml())

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end."""
        return next(iter(complete_checkpoints(self.checkpoints)), None)

    @property
    def is_held(self) -> bool:
        """Whether a process is training into the folder."""
        try:
            require_free(self.path)
        except CacheError:
            return True
        return False

    def check_finished(self) -> None:
        require_utf8(self.path)
        if not self.config.is_file():
            raise PipelineError(f"{self.path}: not a run folder, it has no {self.config.name}; see `pipe train`")
        if not self.adapter.is_dir():
            if self.is_held:
                raise PipelineError(f"{self.path}: {holder(self.path)} is still training this run")
            raise PipelineError(f"{self.path}: this run has no adapter yet; go on with it by `{self.resume_command}`")
        if problem := adapter_damage(self.adapter):
            raise PipelineError(f"{problem}. {self._renewal()}")

    def _renewal(self) -> str:
        """How an adapter that is damaged is made again."""
        kept = f"delete {self.adapter} and run `{self.resume_command}`, which makes it from the last checkpoint; or "
        again = f"train it again with `pipe train {self.config} --name ANOTHER`"
        return f"To make it again: {kept if self.last_checkpoint() else ''}{again}"

    def trained_config(self, overrides: Sequence[str] = ()) -> Config:
        """The finished run's config, with overrides of what is not trained already."""
        self.check_finished()
        for override in overrides:
            section = re.split(r"[.=]", override, maxsplit=1)[0]
            if section in NOT_TRAINED_ANEW:
                raise ConfigError(f"{override!r}: the run is trained already, and {section} is not looked at any more")
        return load_config(self.config, overrides)


RunLike = Run | str | os.PathLike[str] | HasRun
"""What `Run.of` accepts."""


def adapter_damage(folder: Path) -> str | None:
    """Why the files of an adapter cannot be read, in words; None if they can."""
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    try:
        if not isinstance(json.loads(config.read_bytes()), dict):
            return f"{config}: damaged, not a JSON object"
    except FileNotFoundError:
        return f"{config}: not there"
    except (OSError, ValueError) as error:
        return f"{config}: damaged, {error}"
    try:
        with safe_open(weights, "np") as file:
            return None if file.keys() else f"{weights}: damaged, it holds no tensor"
    except FileNotFoundError:
        return f"{weights}: not there"
    except (OSError, SafetensorError) as error:
        return f"{weights}: damaged, {error}"


def read_jsonl(step: float, path: Path) -> list[dict[str, Any]]:
    """The JSON lines up to a step: a killed run wrote beyond its last checkpoint, and its last line perhaps in part."""
    rows: list[dict[str, Any]] = []
    *lines, cut = path.read_bytes().split(b"\n") if path.exists() else [b""]
    damaged = 0
    for line in lines:
        row = _row(line)
        if row is None:
            damaged += 1
        elif row["step"] <= step:
            rows.append(row)
    if damaged:
        log_info(f"{path}: {damaged} damaged lines are skipped")
    last = _row(cut)
    return [*rows, last] if last and last["step"] <= step else rows


def _row(line: bytes) -> dict[str, Any] | None:
    """The row of a step; None if the line is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def append_row(row: dict[str, Any], path: Path) -> None:
    """Add a JSON line."""
    append_line(path, json.dumps(row))


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The rows as JSON lines, in place of what is there."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _evaluated(split: str, with_adapter: bool) -> str:
    return split if with_adapter else f"{split}-no-adapter"


def named_run(output_dir: Path, name: str) -> Run:
    """`output_dir`/NAME. Raises `ConfigError` for a name that leads elsewhere."""
    if name in (".", "..") or Path(name).name != name:
        raise ConfigError(f"--name {name!r} is not one plain name; the folder that runs lie in is train.output_dir")
    return Run(output_dir / name)


def next_run(output_dir: Path, stem: str) -> Run:
    """`output_dir`/STEM-N, N the first number from 1 that is free, also as the beginning of a grid's names."""
    taken = [path.name for path in output_dir.glob(f"{glob.escape(stem)}-*")]
    number = 1
    while any(f"{name}-".startswith(f"{stem}-{number}-") for name in taken):
        number += 1
    return Run(output_dir / f"{stem}-{number}")
