"""`pipe quickstart`: its result, and all stages on the real dataset, which takes minutes."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from pipeline.commands.quickstart import quickstart
from pipeline.common.result import Result
from pipeline.config import Config
from pipeline.runs.run import Run

PIPE = str(Path(sys.executable).with_name("pipe"))
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}


@dataclass(frozen=True)
class Stage(Result):
    """Results of the stages, with the attributes that quickstart reads."""

    cache: str = "caches/easy_vqa"
    cache_bytes: int = 1
    images: int = 5000
    encoded: int = 5000
    images_per_second: float = 2.0
    seconds: float = 3.0
    run: str = ""
    questions: int = 9673
    steps: int = 4
    seconds_training: float = 5.0
    questions_per_second: float = 6.0
    accuracy: float = 0.0


def test_result_has_the_keys_of_all_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages are replaced: the slow tests below run them."""
    called: list[tuple[str, object]] = []
    path = str(tmp_path / "runs" / "easy_vqa-1")

    def precompute(config: Config) -> Stage:
        called.append(("precompute", config.cache.dir))
        return Stage()

    def train(config: Config, name: str) -> Stage:
        called.append(("train", name))
        return Stage(run=path)

    def evaluate(run: Run, with_adapter: bool = True) -> Stage:
        called.append(("evaluate", (str(run.path), with_adapter)))
        return Stage(accuracy=95.0 if with_adapter else 50.0)

    for function in (precompute, train, evaluate):
        monkeypatch.setattr(f"pipeline.commands.quickstart.{function.__name__}", function)
    monkeypatch.setattr(Run, "of", classmethod(lambda cls, source: cls(Path(source.run))), raising=False)
    result = quickstart((f"train.output_dir={tmp_path}/runs", f"cache.dir={tmp_path}/cache"))
    assert called == [
        ("precompute", tmp_path / "cache"),
        ("train", "easy_vqa-1"),
        ("evaluate", (path, False)),
        ("evaluate", (path, True)),
    ]
    assert result is not None
    assert (result.accuracy_before, result.accuracy, result.questions) == (50.0, 95.0, 9673)
    assert (result.cache, result.run, result.adapter) == ("caches/easy_vqa", path, f"{path}/adapter")
    assert result.train == {
        "questions": 9673, "steps": 4, "seconds_training": 5.0, "questions_per_second": 6.0, "seconds": 3.0
    }  # fmt: skip
    assert result.to_dict()["next"][0] == f"pipe report {path}"


def test_other_ranks_return_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("precompute", "train"):
        monkeypatch.setattr(f"pipeline.commands.quickstart.{name}", lambda *_: None)
    monkeypatch.setattr("pipeline.commands.quickstart.evaluate", lambda *_, **__: pytest.fail("evaluated"))
    assert quickstart((f"train.output_dir={tmp_path}/runs", f"cache.dir={tmp_path}/cache")) is None


def pipe(folder: Path, *words: str) -> dict[str, object]:
    done = subprocess.run(
        [PIPE, *words, "--json"], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    summary: dict[str, object] = json.loads(done.stdout)
    return summary


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lora_learns_easy_vqa_with_every_seed(folder: Path, seed: int) -> None:
    summary = pipe(folder, "quickstart", f"train.seed={seed}")
    print(seed, summary["accuracy_before"], summary["accuracy"], summary["seconds"])
    assert summary["questions"] == 9673
    assert summary["accuracy_before"] <= 60
    assert summary["accuracy"] >= 90
    unshared = pipe(folder, "train", f"{summary['run']}/config.yaml", "train.share_prefix=false")
    accuracy_unshared = pipe(folder, "evaluate", str(unshared["run"]))["accuracy"]
    print("one question per sequence:", accuracy_unshared)
    assert abs(summary["accuracy"] - accuracy_unshared) < 1
    encoded = summary["precompute"]["encoded"]
    assert encoded == (5000 if seed == 0 else 0)


@pytest.mark.slow
def test_second_training_gives_the_same_adapter(folder: Path) -> None:
    """Uses the run of the quickstart with seed 0, if it exists."""
    first = folder / "runs" / "easy_vqa-1" / "adapter"
    if not first.exists():
        pipe(folder, "quickstart")
    started = time.monotonic()
    again = pipe(folder, "train", str(first.with_name("config.yaml")))
    startup_seconds = time.monotonic() - started - again["seconds_training"]
    print("seconds to the first step:", startup_seconds)
    second = Path(again["run"]) / "adapter"
    for path in set(first.iterdir()) - {first / "README.md"}:  # the card of the first run has its results
        assert path.read_bytes() == (folder / second / path.name).read_bytes(), path.name
    assert len(load_file(first / "adapter_model.safetensors")) == 16
