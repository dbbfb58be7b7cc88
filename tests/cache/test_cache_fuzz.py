"""Mutated files give correct rows or a CacheError, and never crash."""

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def fuzz(seed, count, folder):
    folder.mkdir()
    command = [sys.executable, HERE / "cache_fuzz.py", str(seed), str(count), folder]
    env = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"seed {seed}: ended with {done.returncode}: {done.stderr[-4000:]}"
    return Counter(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("workers", "count"), [(1, 200), pytest.param(8, 1400, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_mutated_files_give_correct_rows_or_cache_error(tmp_path, workers, count):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda seed: fuzz(seed, count, tmp_path / str(seed)), range(workers))
        outcomes = sum(found, Counter())
    print(dict(outcomes))
    assert sum(outcomes.values()) > 0.9 * workers * count  # some mutations change nothing
    assert {"make_finished: refused", "make_finished: repaired", "make_extended: right", "make_extended: refused"} <= {
        *outcomes
    }
