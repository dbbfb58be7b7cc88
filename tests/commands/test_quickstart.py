"""The main job, as a user runs it, on the real data set. Minutes each."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

PIPE = str(Path(sys.executable).with_name("pipe"))
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}


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
def test_lora_from_the_cache_learns_easy_vqa_with_every_seed(folder: Path, seed: int) -> None:
    summary = pipe(folder, "quickstart", f"train.seed={seed}")
    print(seed, summary["accuracy_before"], summary["accuracy"], summary["seconds"])
    assert summary["questions"] == 9673
    assert summary["accuracy_before"] <= 60
    assert summary["accuracy"] >= 90
    apart = pipe(folder, "train", f"{summary['run']}/config.yaml", "train.share_prefix=false")
    accuracy_apart = pipe(folder, "evaluate", str(apart["run"]))["accuracy"]
    print("one question a sequence:", accuracy_apart)
    assert abs(summary["accuracy"] - accuracy_apart) < 1
    encoded = summary["precompute"]["encoded"]
    assert encoded == (5000 if seed == 0 else 0)


@pytest.mark.slow
def test_a_second_training_gives_the_same_adapter(folder: Path) -> None:
    """After the quickstart with seed 0 above."""
    first = folder / "runs" / "easy_vqa-1" / "adapter"
    if not first.exists():
        pipe(folder, "quickstart")
    started = time.monotonic()
    again = pipe(folder, "train", str(first.with_name("config.yaml")))
    to_first_step = time.monotonic() - started - again["seconds_training"]
    print("seconds to the first step:", to_first_step)
    second = Path(again["run"]) / "adapter"
    for path in set(first.iterdir()) - {first / "README.md"}:  # the card of the first has its results
        assert path.read_bytes() == (folder / second / path.name).read_bytes(), path.name
    assert len(load_file(first / "adapter_model.safetensors")) == 16
