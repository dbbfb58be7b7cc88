"""All stages without what only POSIX systems have, in a process from which it is taken away."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import write_config, write_data_set

HERE = Path(__file__).parent
STAGES = """
import hashlib, json, sys
from pathlib import Path
from pipeline.cli import main

folder, name = Path(sys.argv[1]), sys.argv[2]
cache, run = folder / name / "cache", folder / "runs" / name
for words in (
    ["precompute", f"{folder}/config.yaml", f"cache.dir={cache}"],
    ["train", f"{folder}/config.yaml", f"cache.dir={cache}", "--name", name],
    ["evaluate", f"{run}"],
):
    main([*words, "--json"], standalone_mode=False)
paths = [*cache.glob("*.h5"), *run.glob("adapter/*.safetensors")]
print(json.dumps({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}, sort_keys=True))
"""
WITHOUT_POSIX = """
from without_posix import take_away_posix
take_away_posix("psutil")  # has a module for each platform, and Linux's needs `resource`
from cache import portability
assert portability.fcntl is None and portability.resource is None
"""


def run_stages(folder: Path, name: str, before: str) -> str:
    """Run precompute, train and evaluate in a new process; return the digests of features and adapter."""
    env = os.environ | {"PYTHONPATH": f"{HERE.parent}:{HERE}/cache", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", before + STAGES, str(folder), name]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *summaries, digests = done.stdout.splitlines()
    assert len(summaries) >= 3
    return digests


def test_stages_without_posix_give_same_features_and_adapter(tmp_path: Path) -> None:
    write_data_set(tmp_path, num_images=8)
    write_config(tmp_path, train={"max_steps": 2, "save_steps": 1})
    expected = run_stages(tmp_path, "with", "")
    assert "adapter_model.safetensors" in expected
    assert "features-00000.h5" in expected
    assert run_stages(tmp_path, "without", WITHOUT_POSIX) == expected
