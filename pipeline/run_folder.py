"""A run folder: what lies where in it."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config, load_config
from pipeline.errors import PipelineError


@dataclass(frozen=True)
class RunFolder:
    """One training run on disk."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config, YAML."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a logged step, with `step` and `loss`."""
        return self.path / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        """The adapter in PEFT's form; there when training has ended."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """What a killed run resumes from."""
        return self.path / "checkpoints"

    def results(self, split: str, with_adapter: bool) -> Path:
        """The answers to one split, in the official VQA results form."""
        return self.path / f"results-{split}{'' if with_adapter else '-no-adapter'}.json"

    def check_new(self) -> None:
        if self.path.exists():
            raise PipelineError(f"{self.path}: this run exists already; give another --name, or go on by --resume")

    def check_resumable(self, config: Config) -> None:
        if not self.config.is_file():
            raise PipelineError(f"{self.path}: nothing to resume, no run was started there; train without --resume")
        if self.adapter.is_dir():
            raise PipelineError(f"{self.path}: this run is finished already; see `pipe evaluate {self.path}`")
        changed = config.differences(load_config(self.config))
        if changed:
            raise PipelineError(f"{self.path}: the run was started with other settings:\n  " + "\n  ".join(changed))

    def has_checkpoint(self) -> bool:
        return any(self.checkpoints.glob("checkpoint-*"))

    def check_finished(self) -> None:
        if not self.config.is_file():
            raise PipelineError(
                f"{self.path}: not a run folder, there is no {self.config.name} in it; see `pipe train`"
            )
        if not self.adapter.is_dir():
            raise PipelineError(f"{self.path}: this run has no adapter yet; go on with it by `pipe train ... --resume`")


def next_run(output_dir: Path, stem: str) -> RunFolder:
    """`output_dir`/STEM-N, N the first number from 1 that is free."""
    number = 1
    while (path := output_dir / f"{stem}-{number}").exists():
        number += 1
    return RunFolder(path)
