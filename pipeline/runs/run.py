"""The layout of a run folder, and the checks and the lock that protect it."""

import glob
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open

from cache.files import TEMPORARY
from cache.lock import LOCK_NAME, FolderLock, check_not_locked, describe_holder
from cache.spec import CacheError
from pipeline.common.errors import ConfigError, PipelineError
from pipeline.common.files import WriteError, require_utf8, write_text, writing
from pipeline.config import Config, load_config
from pipeline.runs.checkpoints import complete_checkpoints, remove_incomplete

_LENGTHS = ("train.max_steps: ", "train.epochs: ")
TRAINING_SECTIONS = ("lora", "train", "validation")
"""Config sections that have no effect once a run is trained."""


class HasRun(Protocol):
    """A result that names its run, such as `TrainResult`."""

    @property
    def run(self) -> str:
        """The path of the run folder."""


@dataclass(frozen=True)
class Run:
    """One training run on disk."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))  # a string is a path, too

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
        """The inputs and the summary of the run, JSON."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """Training metrics: a JSON object per logged step, with `step` and `loss`."""
        return self.path / "metrics.jsonl"

    @property
    def validation(self) -> Path:
        """Validation metrics: a JSON object per validation."""
        return self.path / "validation.jsonl"

    @property
    def lora_updates(self) -> Path:
        """LoRA statistics: a JSON object per measurement."""
        return self.path / "lora_updates.jsonl"

    @property
    def report(self) -> Path:
        """The page that `pipe report` writes."""
        return self.path / "report.html"

    @property
    def adapter(self) -> Path:
        """The adapter in PEFT's format, the best one if training was validated; it exists once training is finished."""
        return self.path / "adapter"

    @property
    def last_adapter(self) -> Path:
        """The adapter of the last step, if the best one is another."""
        return self.path / "adapter-last"

    def best_adapter(self, step: int) -> Path:
        """The adapter of a step that was the best so far, kept until training is finished."""
        return self.path / "best" / f"step-{step}"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints to resume from."""
        return self.path / "checkpoints"

    def results(self, split: str, with_adapter: bool) -> Path:
        """The predictions for a split in the dataset's official results format."""
        return self.path / f"results-{_evaluation_name(split, with_adapter)}.json"

    def predictions(self, split: str, with_adapter: bool) -> Path:
        """The predictions with accuracy and probability, JSON lines in the order of the split."""
        return self.path / f"predictions-{_evaluation_name(split, with_adapter)}.jsonl"

    def evaluation(self, split: str, with_adapter: bool) -> Path:
        """The summary of the evaluation of a split, JSON."""
        return self.path / f"evaluation-{_evaluation_name(split, with_adapter)}.json"

    def mistakes(self, split: str, with_adapter: bool) -> Path:
        """The wrong predictions for a split, JSON lines."""
        return self.path / f"mistakes-{_evaluation_name(split, with_adapter)}.jsonl"

    @property
    def resume_command(self) -> str:
        """The command that resumes the run."""
        return f"pipe train {self.path} --resume"

    @property
    def is_unstarted(self) -> bool:
        """Whether the folder does not exist, or holds only what a failed start leaves."""
        if not self.path.is_dir():
            return not self.path.exists()
        leftovers = (LOCK_NAME, self.checkpoints.name)
        only_leftovers = all(path.name in leftovers or path.name.endswith(TEMPORARY) for path in self.path.iterdir())
        return only_leftovers and not any(self.checkpoints.glob("*"))

    @property
    def is_locked(self) -> bool:
        """Whether a process is training in the folder."""
        try:
            check_not_locked(self.path)
        except CacheError:
            return True
        return False

    def check_new(self) -> None:
        """Check that a new run can start in the folder.

        Raises:
            PipelineError: the folder is in use by another run or holds other files.
        """
        require_utf8(self.path)
        if not self.is_unstarted:
            resume = f", or resume the run: `{self.resume_command}`" if self.config.is_file() else ""
            raise PipelineError(f"{self.path}: this run exists already; choose another --name{resume}")

    def check_resumable(self, config: Config) -> None:
        """Check that the run was started, is not finished, and has the settings in `config`.

        Raises:
            PipelineError: it cannot be resumed; the message names every setting that differs.
        """
        if not self.config.is_file():
            advice = "start it without --resume" if self.is_unstarted else "choose another --name"
            raise PipelineError(f"{self.path}: nothing to resume, no run was started there; {advice}")
        changed = config.differences(load_config(self.config))
        advice = self._length_advice(changed)
        if self.adapter.is_dir():
            raise PipelineError(f"{self.path}: this run is finished already; see `pipe evaluate {self.path}`{advice}")
        if changed:
            lines = "\n  ".join(changed)
            raise PipelineError(f"{self.path}: the run was started with other settings:\n  {lines}{advice}")

    def _length_advice(self, changed: Sequence[str]) -> str:
        """Explain how to train for another number of steps, if that is among the changed settings."""
        lengths = [line for line in changed if line.startswith(_LENGTHS)]
        if not lengths:
            return ""
        wanted = " ".join(line.partition(",")[0].replace(": ", "=").replace("None", "null") for line in lengths)
        return (
            "\nThe learning rate schedule depends on the number of steps, so a longer or shorter training is a new "
            f"run on the same cache: pipe train {self.config} {wanted} --name ANOTHER"
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the folder, which is created if needed.

        If the block fails, incomplete checkpoints written in it are removed, and so are folders created for a run that
        did not start.

        Raises:
            PipelineError: another process is training the run; the message names it.
            WriteError: the folder cannot be written.
        """
        created = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            lock = self._lock()
        except WriteError:
            self._discard_if_unstarted(created)
            raise
        checkpoints_before = set(self.checkpoints.glob("*"))
        try:
            yield
        except BaseException:
            remove_incomplete(self.checkpoints, keep=checkpoints_before)
            self._discard_if_unstarted(created)
            raise
        finally:
            lock.release()

    def _lock(self) -> FolderLock:
        try:
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                return FolderLock(self.path)
        except CacheError:
            raise PipelineError(
                f"{self.path}: {describe_holder(self.path)} is training this run; wait for it, or choose another --name"
            ) from None

    def _discard_if_unstarted(self, created: Sequence[Path]) -> None:
        """Remove the folder if training has not started in it, and those of its parents in `created` that are empty."""
        if not self.path.is_dir() or not self.is_unstarted:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        for folder in created:
            with suppress(OSError):
                folder.rmdir()

    def write_config(self, config: Config) -> None:
        """Write the config, which marks the run as started; create the folder if needed."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config, config.to_yaml())

    def last_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint, None if there is none."""
        return next(iter(complete_checkpoints(self.checkpoints)), None)

    def check_finished(self) -> None:
        """Check that the run has an adapter that can be read.

        Raises:
            PipelineError: it has none; the message says how to get one.
        """
        require_utf8(self.path)
        if not self.config.is_file():
            raise PipelineError(f"{self.path}: not a run folder, it has no {self.config.name}; see `pipe train`")
        if not self.adapter.is_dir():
            if self.is_locked:
                raise PipelineError(f"{self.path}: {describe_holder(self.path)} is still training this run")
            raise PipelineError(f"{self.path}: this run has no adapter yet; resume it: `{self.resume_command}`")
        if problem := adapter_damage(self.adapter):
            raise PipelineError(f"{problem}. {self._restore_advice()}")

    def _restore_advice(self) -> str:
        """Explain how to restore a damaged adapter."""
        retrain = f"train it again with `pipe train {self.config} --name ANOTHER`"
        if not self.last_checkpoint():
            return f"To restore it: {retrain}"
        return (
            f"To restore it: delete {self.adapter} and run `{self.resume_command}`, which writes it from the last "
            f"checkpoint; or {retrain}"
        )

    def trained_config(self, overrides: Sequence[str] = ()) -> Config:
        """Return the config of the finished run with `overrides`.

        Raises:
            PipelineError: the run is not finished.
            ConfigError: an override is invalid, or is of a section in `TRAINING_SECTIONS`.
        """
        self.check_finished()
        for override in overrides:
            section = re.split(r"[.=]", override, maxsplit=1)[0]
            if section in TRAINING_SECTIONS:
                raise ConfigError(f"{override!r}: the run is trained already, {section} has no effect any more")
        return load_config(self.config, overrides)


RunLike = Run | str | os.PathLike[str] | HasRun
"""What `Run.of` accepts."""


def adapter_damage(folder: Path) -> str | None:
    """Return why the files of an adapter cannot be read, None if they can."""
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    try:
        if not isinstance(json.loads(config.read_bytes()), dict):
            return f"{config}: damaged, not a JSON object"
    except FileNotFoundError:
        return f"{config}: missing"
    except (OSError, ValueError) as error:
        return f"{config}: damaged, {error}"
    try:
        with safe_open(weights, "np") as file:
            return None if file.keys() else f"{weights}: damaged, it holds no tensor"
    except FileNotFoundError:
        return f"{weights}: missing"
    except (OSError, SafetensorError) as error:
        return f"{weights}: damaged, {error}"


def _evaluation_name(split: str, with_adapter: bool) -> str:
    return split if with_adapter else f"{split}-no-adapter"


def named_run(output_dir: Path, name: str) -> Run:
    """Return the run `output_dir`/`name`.

    Raises:
        ConfigError: `name` is not a plain folder name.
    """
    if name in (".", "..") or Path(name).name != name:
        raise ConfigError(f"--name {name!r} is not a plain folder name; train.output_dir sets the parent folder")
    return Run(output_dir / name)


def next_run(output_dir: Path, stem: str) -> Run:
    """Return the run `output_dir`/`stem`-N with the lowest N from 1 that no run and no grid uses."""
    taken = [path.name for path in output_dir.glob(f"{glob.escape(stem)}-*")]
    number = 1
    while any(f"{name}-".startswith(f"{stem}-{number}-") for name in taken):
        number += 1
    return Run(output_dir / f"{stem}-{number}")
