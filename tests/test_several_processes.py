"""Stage one in several processes: the same bytes whatever their number, one voice, and no hang.

The fast tests fork the processes and give them what `torchrun` gives; the slow ones run `torchrun` itself.
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
from processes import HUNG, Ended, Running, contents, pipe, started, wait_for
from ranks import FREED, forbid_freeing_the_group, team, together

import cache.lock
import cache.part
import pipeline.encoding.encoding_loop
from cache.audit import verify
from cache.estimate import estimate_write
from cache.reader import FeatureReader
from pipeline.common.distributed import ENCODING_TIMEOUT, GROUP_TIMEOUT, DistributedContext
from pipeline.encoding.images import read_image_bytes

PIPE = Path(sys.executable).with_name("pipe")
PICTURES = 44
BROKEN = "13.png"  # in a part of process 1, whatever the number of processes above one
DEEP = "15.png"

REASON = "cannot be decoded: image file is truncated"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with a picture that cannot be decoded and one of 16 bits, in five parts."""
    folder = tmp_path_factory.mktemp("data")
    write_data_set(folder, PICTURES)
    broken = folder / "images" / BROKEN
    broken.write_bytes(broken.read_bytes()[:-100])
    Image.effect_noise((64, 64), 90).convert("I;16").save(folder / "images" / DEEP)
    settings = {"batch_size": 4, "num_workers": 1, "dtype": "float32", "on_invalid": "skip"}
    return write_config(
        folder, cache={"dir": f"{folder}/cache", "dtype": "float32", "part_rows": 10}, precompute=settings
    )


@pytest.fixture(scope="module")
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the cache that one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    assert pipe(folder, "precompute", config, f"cache.dir={folder}/cache").status == 0
    return contents(folder / "cache")


def slow_pictures() -> None:
    """So that something can happen in the middle."""

    def read(path: Path) -> bytes:
        time.sleep(0.05)
        return read_image_bytes(path)

    cache.part.COMMIT_SECONDS = 0.0
    pipeline.encoding.encoding_loop.read_image_bytes = read


@pytest.mark.parametrize("size", [2, 6])
def test_the_cache_is_the_same_and_one_process_speaks(
    config: Path, alone: dict[str, bytes], tmp_path: Path, size: int
) -> None:
    """Six: more than there are parts."""
    ended = together(tmp_path, size, "precompute", config, f"cache.dir={tmp_path}/cache", "--json")
    assert [one.status for one in ended] == [0] * size, "\n".join(one.err for one in ended)
    assert contents(tmp_path / "cache") == alone
    assert not verify(tmp_path / "cache").damage
    summary = json.loads(ended[0].out)
    assert (summary["images"], summary["encoded"], summary["failed"]) == (PICTURES - 1, PICTURES - 1, 1)
    assert summary["skipped"] == {REASON: 3}
    assert summary["rescaled_images"] == 1
    assert [one.err.count("scaled to its own range") for one in ended] == [1] + [0] * (size - 1)
    assert f"3 questions ({REASON}: " in ended[0].err
    assert [(one.out, one.err) for one in ended[1:]] == [("", "")] * (size - 1)
    told = ended[0].told()
    assert len(told) == len(set(told)), told


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("data.train.annotations=/nowhere.jsonl", "/nowhere.jsonl: cannot be read"),
        ("model.checkpoint=/nowhere", "/nowhere"),
        ("cache.part_row=3", "unknown key cache.part_row; did you mean part_rows?"),
    ],
)
def test_what_is_wrong_is_told_once_and_all_end(config: Path, tmp_path: Path, wrong: str, words: str) -> None:
    first, second = together(tmp_path, 2, "precompute", config, f"cache.dir={tmp_path}/cache", wrong)
    assert words in first.error()
    assert (second.status, second.out, second.err) == (first.status, "", "")


def test_a_dry_run_is_told_once(config: Path, tmp_path: Path) -> None:
    words = ("precompute", config, f"cache.dir={tmp_path}/cache", "--dry-run", "--json")
    first, second = together(tmp_path, 2, *words)
    assert json.loads(first.out)["to_encode"] == PICTURES
    assert (second.status, second.out, second.err) == (0, "", "")


def test_ctrl_c_is_told_once(config: Path, tmp_path: Path) -> None:
    with team(tmp_path, 2, "precompute", config, f"cache.dir={tmp_path}/cache", prepare=slow_pictures) as processes:
        wait_for((tmp_path / "cache" / "features-00000.h5").exists, processes[0])
        for process in processes:
            os.kill(process.process.pid or 0, signal.SIGINT)
        first, second = [process.ended() for process in processes]
    assert "Interrupted. Completed work is saved" in first.error()
    assert (second.status, second.out, second.err) == (1, "", "")


def test_a_picture_that_another_process_found_broken_is_told_by_the_first(config: Path, tmp_path: Path) -> None:
    words = ("precompute", config, f"cache.dir={tmp_path}/cache", "precompute.on_invalid=error")
    told = together(tmp_path, 2, *words)[0].error()
    assert f"3 questions ({REASON}: " in told
    assert BROKEN in told
    listed = [json.loads(line) for line in (tmp_path / "cache.skipped.jsonl").read_text().splitlines()]
    assert [Path(one["image"]).name for one in listed] == [BROKEN]


def test_a_process_that_dies_ends_the_others_and_the_work_goes_on(
    config: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    words = ("precompute", config, f"cache.dir={tmp_path}/cache")
    with team(tmp_path, 3, *words, prepare=slow_pictures) as processes:
        wait_for((tmp_path / "cache" / "features-00000.h5").exists, processes[0])
        processes[1].process.kill()
        first, second, third = [process.ended() for process in processes]
    assert "another rank exited early" in first.error()
    assert (second.status, second.err, third.status, third.err) == (-signal.SIGKILL, "", 1, "")
    assert pipe(tmp_path, *words).status == 0
    assert contents(tmp_path / "cache") == alone


@pytest.mark.parametrize(("before", "after"), [(1, 3), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_killed_in_one_number_and_finished_in_another(
    config: Path, alone: dict[str, bytes], tmp_path: Path, before: int, after: int
) -> None:
    words = ("precompute", config, f"cache.dir={tmp_path}/cache")
    with team(tmp_path, before, *words, prepare=slow_pictures) as processes:
        wait_for((tmp_path / "cache" / "features-00000.h5").exists, processes[0])
        for process in processes:
            process.process.kill()
    assert not (tmp_path / "cache" / "manifest.json").exists()
    ended = together(tmp_path, after, *words, "--json")
    assert [one.status for one in ended] == [0] * after
    assert 10 <= json.loads(ended[0].out)["reused"] < PICTURES - 1
    assert contents(tmp_path / "cache") == alone


def test_the_group_is_never_freed(config: Path, tmp_path: Path) -> None:
    words = ("precompute", config, f"cache.dir={tmp_path}/cache")
    ended = together(tmp_path, 2, *words, prepare=forbid_freeing_the_group)
    assert [one.status for one in ended] == [0, 0]
    assert not any(FREED in one.err for one in ended)


@pytest.mark.parametrize(("end", "status"), [("pass", 0), ("sys.exit(3)", 3), ("sys.exit('why')", 1), ("1 / 0", 1)])
def test_a_process_in_a_group_ends_without_freeing_anything(tmp_path: Path, end: str, status: int) -> None:
    """Not at the interpreter's end either: it would free the group. Exit functions run, and what is printed is seen."""
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
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=HUNG)
    assert (done.returncode, done.stdout.split()) == (status, ["done", "exit", "function"]), done.stderr
    assert ("ZeroDivisionError" in done.stderr) == (end == "1 / 0")


@pytest.mark.parametrize(("timeout", "own_group"), [(GROUP_TIMEOUT, []), (ENCODING_TIMEOUT, [ENCODING_TIMEOUT])])
def test_only_stage_one_waits_for_long(
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


def stop_in_the_middle(go: Path) -> None:
    """No picture is read to be encoded until there is a file `go`."""

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


def be_patient(seconds: float) -> None:
    cache.lock.LOCK_TIMEOUT_SECONDS = seconds  # type: ignore[assignment]


def test_of_two_starts_at_the_same_time_the_second_says_who_holds_the_cache(
    config: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    words = ("precompute", config, f"cache.dir={tmp_path}/cache")
    with started(tmp_path, *words, prepare=partial(stop_in_the_middle, tmp_path / "go")) as first:
        wait_for(lambda: any((tmp_path / "cache").glob("*.partial")), first)
        told = pipe(tmp_path, *words, prepare=partial(be_patient, 0.5)).error()
        assert f"process {first.process.pid} on {socket.gethostname()}" in told
        assert "Run the command again when it has finished" in told
        (tmp_path / "go").touch()
        assert first.ended().status == 0
    assert contents(tmp_path / "cache") == alone


def test_a_second_start_that_waits_finds_everything_done(config: Path, alone: dict[str, bytes], tmp_path: Path) -> None:
    words = ("precompute", config, f"cache.dir={tmp_path}/cache", "--json")
    with started(tmp_path, *words, prepare=partial(stop_in_the_middle, tmp_path / "go")) as first:
        wait_for(lambda: any((tmp_path / "cache").glob("*.partial")), first)
        with started(tmp_path, *words, prepare=partial(be_patient, HUNG)) as second:
            wait_for(lambda: has_open(second, tmp_path / "cache" / ".lock"), second)
            (tmp_path / "go").touch()
            summaries = [json.loads(process.ended().out) for process in (first, second)]
    assert [summary["encoded"] for summary in summaries] == [PICTURES - 1, 0]
    assert contents(tmp_path / "cache") == alone


def test_the_cache_can_be_looked_at_while_it_is_written(config: Path, alone: dict[str, bytes], tmp_path: Path) -> None:
    """As a dry run, or a second start, does."""
    folder = tmp_path / "cache"
    (tmp_path / "spec").mkdir()
    for name, data in alone.items():
        (tmp_path / "spec" / name).write_bytes(data)
    reader = FeatureReader(tmp_path / "spec")
    digests = [digest for digest, _ in reader.stored()]
    stored = [0]
    with started(tmp_path, "precompute", config, f"cache.dir={folder}", "cache.part_rows=1") as running:
        began = time.monotonic()
        while running.process.is_alive() and time.monotonic() - began < HUNG:
            stored.append(estimate_write(folder, reader.spec, digests).stored)
            time.sleep(0.002)
        assert running.ended().status == 0
    assert stored == sorted(stored)


def torchrun(size: int, *words: object) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return [*launcher, "--no-python", str(PIPE), *map(str, words)]


def launched(size: int, *words: object) -> Ended:
    done = subprocess.run(torchrun(size, *words), capture_output=True, text=True, check=False, timeout=HUNG)
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_torchrun_makes_the_same_cache(config: Path, alone: dict[str, bytes], tmp_path: Path, size: int) -> None:
    ended = launched(size, "precompute", config, f"cache.dir={tmp_path}/cache", "--json")
    assert ended.status == 0, ended.err
    assert json.loads(ended.out)["encoded"] == PICTURES - 1  # one object, and nothing else
    assert contents(tmp_path / "cache") == alone
    told = ended.told()
    assert len(told) == len(set(told)), told
    assert "Traceback" not in ended.err


@pytest.mark.slow
def test_torchrun_ends_when_the_input_is_bad(config: Path, tmp_path: Path) -> None:
    wrong = "data.train.annotations=/nowhere.jsonl"
    ended = launched(3, "precompute", config, f"cache.dir={tmp_path}/cache", wrong, "--json")
    assert (ended.status, ended.out) == (1, "")
    assert [line for line in ended.told() if line.startswith("pipe: ")] == [
        "pipe: /nowhere.jsonl: cannot be read: No such file or directory"
    ]
    assert not (tmp_path / "cache").exists()


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [one for child in children for one in (child, *descendants(child))]


@pytest.mark.slow
def test_torchrun_killed_with_all_its_processes(config: Path, alone: dict[str, bytes], tmp_path: Path) -> None:
    words = ("precompute", config, f"cache.dir={tmp_path}/cache")
    began = time.monotonic()
    with subprocess.Popen(torchrun(3, *words), stderr=subprocess.DEVNULL) as launcher:
        while not any((tmp_path / "cache").glob("*.partial")) and time.monotonic() - began < HUNG:
            assert launcher.poll() is None
            time.sleep(0.01)
        for pid in (launcher.pid, *descendants(launcher.pid)):
            os.kill(pid, signal.SIGKILL)
    assert not (tmp_path / "cache" / "manifest.json").exists()
    assert launched(2, *words).status == 0
    assert contents(tmp_path / "cache") == alone
