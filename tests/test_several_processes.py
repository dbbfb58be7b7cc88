"""Stage one on several ranks: the same cache for any world size, logs from rank 0 only, and no deadlock.

The fast tests fork the processes and set the environment of `torchrun`; the slow ones run `torchrun` itself.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from data_set import write_config, write_data_set
from PIL import Image
from processes import TIMEOUT, Finished, Running, contents, pipe, started, wait_for
from ranks import FREED, report_group_destruction, run_ranks, running_ranks

import cache.lock
import cache.part
import pipeline.encoding.encoding_loop
from cache.audit import verify
from cache.estimate import estimate_write
from cache.reader import FeatureReader
from pipeline.common.distributed import ENCODING_TIMEOUT, GROUP_TIMEOUT, DistributedContext
from pipeline.encoding.images import read_image_bytes

PIPE = Path(sys.executable).with_name("pipe")
NUM_IMAGES = 44
BROKEN = "13.png"  # in a part of rank 1 for any world size above 1
DEEP = "15.png"

REASON = "cannot be decoded: image file is truncated"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config with five parts, and a dataset with an undecodable and a 16-bit image."""
    folder = tmp_path_factory.mktemp("data")
    write_data_set(folder, NUM_IMAGES)
    broken = folder / "images" / BROKEN
    broken.write_bytes(broken.read_bytes()[:-100])
    Image.effect_noise((64, 64), 90).convert("I;16").save(folder / "images" / DEEP)
    settings = {"batch_size": 4, "num_workers": 1, "dtype": "float32", "on_invalid": "skip"}
    return write_config(
        folder, cache={"dir": f"{folder}/cache", "dtype": "float32", "part_rows": 10}, precompute=settings
    )


@pytest.fixture(scope="module")
def single_rank_files(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the cache that one process writes."""
    folder = tmp_path_factory.mktemp("single")
    assert pipe(folder, "precompute", config, f"cache.dir={folder}/cache").status == 0
    return contents(folder / "cache")


def slow_images() -> None:
    """Read images slowly, so that tests can act while they are encoded."""

    def read(path: Path) -> bytes:
        time.sleep(0.05)
        return read_image_bytes(path)

    cache.part.COMMIT_SECONDS = 0.0
    pipeline.encoding.encoding_loop.read_image_bytes = read


@pytest.mark.parametrize("size", [2, 6])
def test_cache_is_the_same_and_only_rank_0_logs(
    config: Path, single_rank_files: dict[str, bytes], tmp_path: Path, size: int
) -> None:
    """With six ranks there are more ranks than parts."""
    finished = run_ranks(tmp_path, size, "precompute", config, f"cache.dir={tmp_path}/cache", "--json")
    assert [one.status for one in finished] == [0] * size, "\n".join(one.err for one in finished)
    assert contents(tmp_path / "cache") == single_rank_files
    assert not verify(tmp_path / "cache").damage
    summary = json.loads(finished[0].out)
    assert (summary["images"], summary["encoded"], summary["failed"]) == (NUM_IMAGES - 1, NUM_IMAGES - 1, 1)
    assert summary["skipped"] == {REASON: 3}
    assert summary["rescaled_images"] == 1
    assert [one.err.count("scaled to its own range") for one in finished] == [1] + [0] * (size - 1)
    assert f"3 questions ({REASON}: " in finished[0].err
    assert [(one.out, one.err) for one in finished[1:]] == [("", "")] * (size - 1)
    lines = finished[0].log_lines()
    assert len(lines) == len(set(lines)), lines


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train.annotations=/nowhere.jsonl", "/nowhere.jsonl: cannot be read"),
        ("model.checkpoint=/nowhere", "/nowhere"),
        ("cache.part_row=3", "unknown key cache.part_row; did you mean part_rows?"),
    ],
)
def test_invalid_input_is_one_error_and_ends_all_ranks(
    config: Path, tmp_path: Path, override: str, message: str
) -> None:
    first, second = run_ranks(tmp_path, 2, "precompute", config, f"cache.dir={tmp_path}/cache", override)
    assert message in first.error()
    assert (second.status, second.out, second.err) == (first.status, "", "")


def test_dry_run_is_printed_once(config: Path, tmp_path: Path) -> None:
    words = ("precompute", config, f"cache.dir={tmp_path}/cache", "--dry-run", "--json")
    first, second = run_ranks(tmp_path, 2, *words)
    assert json.loads(first.out)["to_encode"] == NUM_IMAGES
    assert (second.status, second.out, second.err) == (0, "", "")


def test_ctrl_c_is_printed_once(config: Path, tmp_path: Path) -> None:
    with running_ranks(
        tmp_path, 2, "precompute", config, f"cache.dir={tmp_path}/cache", prepare=slow_images
    ) as processes:
        wait_for((tmp_path / "cache" / "features-00000.h5").exists, processes[0])
        for process in processes:
            os.kill(process.process.pid or 0, signal.SIGINT)
        first, second = [process.wait() for process in processes]
    assert "Interrupted. Completed work is saved" in first.error()
    assert (second.status, second.out, second.err) == (1, "", "")


def test_invalid_image_of_another_rank_is_an_error_on_rank_0(config: Path, tmp_path: Path) -> None:
    words = ("precompute", config, f"cache.dir={tmp_path}/cache", "precompute.on_invalid=error")
    error = run_ranks(tmp_path, 2, *words)[0].error()
    assert f"3 questions ({REASON}: " in error
    assert BROKEN in error
    listed = [json.loads(line) for line in (tmp_path / "cache.skipped.jsonl").read_text().splitlines()]
    assert [Path(one["image"]).name for one in listed] == [BROKEN]


def test_all_ranks_end_when_one_dies_and_the_next_run_resumes(
    config: Path, single_rank_files: dict[str, bytes], tmp_path: Path
) -> None:
    words = ("precompute", config, f"cache.dir={tmp_path}/cache")
    with running_ranks(tmp_path, 3, *words, prepare=slow_images) as processes:
        wait_for((tmp_path / "cache" / "features-00000.h5").exists, processes[0])
        processes[1].process.kill()
        first, second, third = [process.wait() for process in processes]
    assert "another rank exited early" in first.error()
    assert (second.status, second.err, third.status, third.err) == (-signal.SIGKILL, "", 1, "")
    assert pipe(tmp_path, *words).status == 0
    assert contents(tmp_path / "cache") == single_rank_files


@pytest.mark.parametrize(("before", "after"), [(1, 3), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_killed_run_resumes_with_another_world_size(
    config: Path, single_rank_files: dict[str, bytes], tmp_path: Path, before: int, after: int
) -> None:
    words = ("precompute", config, f"cache.dir={tmp_path}/cache")
    with running_ranks(tmp_path, before, *words, prepare=slow_images) as processes:
        wait_for((tmp_path / "cache" / "features-00000.h5").exists, processes[0])
        for process in processes:
            process.process.kill()
    assert not (tmp_path / "cache" / "manifest.json").exists()
    finished = run_ranks(tmp_path, after, *words, "--json")
    assert [one.status for one in finished] == [0] * after
    assert 10 <= json.loads(finished[0].out)["reused"] < NUM_IMAGES - 1
    assert contents(tmp_path / "cache") == single_rank_files


def test_process_group_is_never_destroyed(config: Path, tmp_path: Path) -> None:
    words = ("precompute", config, f"cache.dir={tmp_path}/cache")
    finished = run_ranks(tmp_path, 2, *words, prepare=report_group_destruction)
    assert [one.status for one in finished] == [0, 0]
    assert not any(FREED in one.err for one in finished)


@pytest.mark.parametrize(("end", "status"), [("pass", 0), ("sys.exit(3)", 3), ("sys.exit('why')", 1), ("1 / 0", 1)])
def test_process_in_a_group_exits_without_destructors(tmp_path: Path, end: str, status: int) -> None:
    """The interpreter's shutdown would destroy the group. Exit functions run, and output is flushed."""
    script = f"""
import atexit, sys
from torch import distributed
from pipeline.common.distributed import exit_without_group_teardown

class Freed:
    def __del__(self):
        print("freed", flush=True)

freed = Freed()
atexit.register(print, "exit function")
distributed.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
with exit_without_group_teardown():
    print("done")
    {end}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=TIMEOUT)
    assert (done.returncode, done.stdout.split()) == (status, ["done", "exit", "function"]), done.stderr
    assert ("ZeroDivisionError" in done.stderr) == (end == "1 / 0")


@pytest.mark.parametrize(("timeout", "own_group"), [(GROUP_TIMEOUT, []), (ENCODING_TIMEOUT, [ENCODING_TIMEOUT])])
def test_only_stage_one_has_a_long_timeout(
    monkeypatch: pytest.MonkeyPatch, timeout: timedelta, own_group: list[timedelta]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    default: list[timedelta] = []
    own: list[timedelta] = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda _, timeout: default.append(timeout))
    monkeypatch.setattr(torch.distributed, "new_group", lambda timeout, backend: own.append(timeout))
    with DistributedContext(timeout):
        pass
    assert (default, own) == ([GROUP_TIMEOUT], own_group)
    assert GROUP_TIMEOUT <= timedelta(hours=1) < timedelta(days=7) <= ENCODING_TIMEOUT


def block_encoding(go: Path) -> None:
    """Block the encoding until the file `go` exists."""

    def read(path: Path) -> bytes:
        while not go.exists():
            time.sleep(0.01)
        return read_image_bytes(path)

    pipeline.encoding.encoding_loop.read_image_bytes = read


def has_open(running: Running, path: Path) -> bool:
    for link in Path(f"/proc/{running.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if link.readlink() == path:
                return True
    return False


def set_lock_timeout(seconds: float) -> None:
    cache.lock.LOCK_TIMEOUT_SECONDS = seconds  # type: ignore[assignment]


def test_second_start_names_the_process_that_holds_the_lock(
    config: Path, single_rank_files: dict[str, bytes], tmp_path: Path
) -> None:
    words = ("precompute", config, f"cache.dir={tmp_path}/cache")
    with started(tmp_path, *words, prepare=partial(block_encoding, tmp_path / "go")) as first:
        wait_for(lambda: any((tmp_path / "cache").glob("*.partial")), first)
        error = pipe(tmp_path, *words, prepare=partial(set_lock_timeout, 0.5)).error()
        assert f"process {first.process.pid} on {socket.gethostname()}" in error
        assert "Run the command again when it has finished" in error
        (tmp_path / "go").touch()
        assert first.wait().status == 0
    assert contents(tmp_path / "cache") == single_rank_files


def test_second_start_waits_and_has_nothing_to_encode(
    config: Path, single_rank_files: dict[str, bytes], tmp_path: Path
) -> None:
    words = ("precompute", config, f"cache.dir={tmp_path}/cache", "--json")
    with started(tmp_path, *words, prepare=partial(block_encoding, tmp_path / "go")) as first:
        wait_for(lambda: any((tmp_path / "cache").glob("*.partial")), first)
        with started(tmp_path, *words, prepare=partial(set_lock_timeout, TIMEOUT)) as second:
            wait_for(lambda: has_open(second, tmp_path / "cache" / ".lock"), second)
            (tmp_path / "go").touch()
            summaries = [json.loads(process.wait().out) for process in (first, second)]
    assert [summary["encoded"] for summary in summaries] == [NUM_IMAGES - 1, 0]
    assert contents(tmp_path / "cache") == single_rank_files


def test_cache_can_be_inspected_while_it_is_written(
    config: Path, single_rank_files: dict[str, bytes], tmp_path: Path
) -> None:
    """As a dry run or a second start does."""
    folder = tmp_path / "cache"
    (tmp_path / "spec").mkdir()
    for name, data in single_rank_files.items():
        (tmp_path / "spec" / name).write_bytes(data)
    reader = FeatureReader(tmp_path / "spec")
    digests = [digest for digest, _ in reader.stored()]
    stored = [0]
    with started(tmp_path, "precompute", config, f"cache.dir={folder}", "cache.part_rows=1") as running:
        began = time.monotonic()
        while running.process.is_alive() and time.monotonic() - began < TIMEOUT:
            stored.append(estimate_write(folder, reader.spec, digests).stored)
            time.sleep(0.002)
        assert running.wait().status == 0
    assert stored == sorted(stored)


def torchrun_command(size: int, *words: object) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return [*launcher, "--no-python", str(PIPE), *map(str, words)]


def run_torchrun(size: int, *words: object) -> Finished:
    done = subprocess.run(torchrun_command(size, *words), capture_output=True, text=True, check=False, timeout=TIMEOUT)
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_torchrun_writes_the_same_cache(
    config: Path, single_rank_files: dict[str, bytes], tmp_path: Path, size: int
) -> None:
    finished = run_torchrun(size, "precompute", config, f"cache.dir={tmp_path}/cache", "--json")
    assert finished.status == 0, finished.err
    assert json.loads(finished.out)["encoded"] == NUM_IMAGES - 1  # one object, and nothing else
    assert contents(tmp_path / "cache") == single_rank_files
    lines = finished.log_lines()
    assert len(lines) == len(set(lines)), lines
    assert "Traceback" not in finished.err


@pytest.mark.slow
def test_torchrun_ends_on_invalid_input(config: Path, tmp_path: Path) -> None:
    override = "data.train.annotations=/nowhere.jsonl"
    finished = run_torchrun(3, "precompute", config, f"cache.dir={tmp_path}/cache", override, "--json")
    assert (finished.status, finished.out) == (1, "")
    assert [line for line in finished.log_lines() if line.startswith("pipe: ")] == [
        "pipe: /nowhere.jsonl: cannot be read: No such file or directory"
    ]
    assert not (tmp_path / "cache").exists()


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [one for child in children for one in (child, *descendants(child))]


@pytest.mark.slow
def test_torchrun_killed_with_all_ranks_can_be_resumed(
    config: Path, single_rank_files: dict[str, bytes], tmp_path: Path
) -> None:
    words = ("precompute", config, f"cache.dir={tmp_path}/cache")
    began = time.monotonic()
    with subprocess.Popen(torchrun_command(3, *words), stderr=subprocess.DEVNULL) as launcher:
        while not any((tmp_path / "cache").glob("*.partial")) and time.monotonic() - began < TIMEOUT:
            assert launcher.poll() is None
            time.sleep(0.01)
        for pid in (launcher.pid, *descendants(launcher.pid)):
            os.kill(pid, signal.SIGKILL)
    assert not (tmp_path / "cache" / "manifest.json").exists()
    assert run_torchrun(2, *words).status == 0
    assert contents(tmp_path / "cache") == single_rank_files
