"""Stage one killed, interrupted, starved of disk or robbed of its folder: it tells why, and the next run goes on.

In the end the cache is, byte for byte, that of a run that nothing disturbed.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from data_set import write_config, write_data_set
from processes import HUNG, Ended, Mounts, Running, contents, pipe, started

import cache.part
import pipeline.commands.precompute
import pipeline.encoding.encoding_loop
from cache.audit import verify
from cache.format import NOT_WRITTEN, PART_NAME, inspect_part
from cache.hdf5 import PAGE
from pipeline.encoding.images import read_image_bytes

PICTURES = 52
PART_ROWS = 10  # six parts: of the last, of two rows, no picture can be decoded
BROKEN = (5, 17, 18, 47, 51)


@dataclass(frozen=True)
class Undisturbed:
    """A data set, and what stage one makes of it if it is let alone."""

    config: Path
    files: dict[str, bytes]
    seconds: float

    def holds(self, folder: Path) -> bool:
        """Whether a cache is byte for byte the same, and sound."""
        return contents(folder) == self.files and not verify(folder).damage


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_data_set(folder, PICTURES)
    for number in BROKEN:
        picture = folder / "images" / f"{number}.png"
        picture.write_bytes(picture.read_bytes()[:-200])  # its header is good
    settings = {"batch_size": 4, "num_workers": 2, "dtype": "float32", "on_invalid": "skip"}
    dirs = {"dir": f"{folder}/cache", "dtype": "float32", "part_rows": PART_ROWS}
    config = write_config(folder, cache=dirs, precompute=settings)
    for name in ("first", "timed"):  # the first also starts the process that the others are forked from
        began = time.perf_counter()
        whole = folder / name / "cache"  # each in a parent of its own: rows are copied from caches beside
        assert pipe(folder, "precompute", config, f"cache.dir={whole}", prepare=commit_always).status == 0
        seconds = time.perf_counter() - began
    assert contents(whole) == contents(folder / "first" / "cache")
    assert sum(name.startswith("features") for name in contents(whole)) == 5
    return Undisturbed(config, contents(whole), seconds)


def commit_always() -> None:
    """So that a kill finds more than the first rows."""
    cache.part.COMMIT_SECONDS = 0.0


def slow_pictures() -> None:
    """So that a signal comes in the middle."""

    def read(path: Path) -> bytes:
        time.sleep(0.05)
        return read_image_bytes(path)

    commit_always()
    pipeline.encoding.encoding_loop.read_image_bytes = read


def no_look_ahead() -> None:
    """As if another program had taken the room after the command has looked."""
    commit_always()
    pipeline.encoding.preflight.check_disk_space = lambda *_: None  # type: ignore[assignment]


def rows_done(folder: Path) -> int | None:
    """Of an unfinished cache, the rows that are done or given up; None if it is finished, or not begun."""
    if not folder.exists() or (folder / "manifest.json").exists():
        return None
    parts = [inspect_part(path) for path in folder.iterdir() if PART_NAME.fullmatch(path.name)]
    return sum(int((part.crc32 != NOT_WRITTEN).sum()) for part in parts)


@pytest.mark.parametrize("moments", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on_and_ends_the_same(
    undisturbed: Undisturbed, tmp_path: Path, moments: int
) -> None:
    rng = random.Random(moments)
    left: list[int | None] = []
    for moment in range(moments):
        folder = tmp_path / str(moment) / "cache"
        words = ("precompute", undisturbed.config, f"cache.dir={folder}")
        for _ in range(rng.choice([1, 1, 2])):
            with started(tmp_path, *words, prepare=commit_always) as running:
                running.process.join(rng.uniform(0, undisturbed.seconds))
                running.process.kill()
            left.append(rows_done(folder))
        assert pipe(tmp_path, *words).status == 0
        assert undisturbed.holds(folder), f"after kill {len(left)}"
    unfinished = [rows for rows in left if rows is not None]
    assert len(unfinished) >= len(left) / 5, f"few kills came while it was at work: {left}"
    assert moments < 50 or sum(0 < rows < PICTURES for rows in unfinished) >= 5, f"hardly any between rows: {left}"


def wait_for_part(folder: Path, running: Running) -> None:
    """Until the first part is full."""
    while not (folder / "features-00000.h5").exists():
        assert running.process.is_alive(), running.err
        time.sleep(0.01)


def test_ctrl_c_is_told_in_a_line_and_the_same_command_goes_on(undisturbed: Undisturbed, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    words = ("precompute", undisturbed.config, f"cache.dir={folder}")
    with started(tmp_path, *words, prepare=slow_pictures) as running:
        wait_for_part(folder, running)
        os.kill(running.process.pid or 0, signal.SIGINT)
        told = running.ended().error()
    assert "Interrupted. Completed work is saved. Rerun the command, or for training" in told
    assert PART_ROWS <= (rows_done(folder) or 0) < PICTURES
    assert pipe(tmp_path, *words).status == 0
    assert undisturbed.holds(folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_real_command(undisturbed: Undisturbed, tmp_path: Path, number: signal.Signals) -> None:
    for attempt in range(5):  # on a busy machine a signal may come when all is done
        folder = tmp_path / str(attempt) / "cache"
        words = [Path(sys.executable).with_name("pipe"), "precompute", undisturbed.config, f"cache.dir={folder}"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            while not any(folder.glob("*.partial")) and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(number)
            out, err = process.communicate(timeout=HUNG)
        if process.returncode != 0:
            break
    assert (out, "Traceback" in err) == ("", False)
    if number == signal.SIGINT:
        assert Ended(process.returncode, out, err).error().startswith("pipe: Interrupted")
    else:
        assert process.returncode == -signal.SIGTERM
    assert rows_done(folder) is not None
    assert subprocess.run([*words, "--json"], capture_output=True, check=False, timeout=HUNG).returncode == 0
    assert undisturbed.holds(folder)


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    (tmp_path / "disk").mkdir()
    try:
        made = Mounts(tmp_path / "disk")
    except OSError as error:
        pytest.skip(f"mounts of its own are not permitted here: {error}")
    yield made
    made.close()


def bytes_on_disk(undisturbed: Undisturbed, mounts: Mounts, logs: Path) -> tuple[int, int]:
    """What the finished cache takes on a disk of ours, and of it the files other than parts."""
    mounts.do(f"mount -t tmpfs -o size=8m tmpfs {mounts.place}")
    folder = mounts.folder / "cache"
    assert pipe(logs, "precompute", undisturbed.config, f"cache.dir={folder}").status == 0
    found = os.statvfs(folder)
    others = [path for path in folder.iterdir() if not PART_NAME.fullmatch(path.name)]
    taken = (found.f_blocks - found.f_bfree) * found.f_frsize, sum(path.stat().st_blocks * 512 for path in others)
    mounts.do(f"umount {mounts.place}")
    return taken


def fill_up(disk: Path, room: int) -> Path:
    """Leaves `room` bytes free; -> the file that takes the rest."""
    found = os.statvfs(disk)
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - room)
    return disk / "filler"


def run_full(undisturbed: Undisturbed, mounts: Mounts, room: int, logs: Path) -> str:
    """Stage one on a disk with `room` bytes, and once more when there is more; -> what the first said."""
    mounts.do(f"mount -t tmpfs -o size=8m tmpfs {mounts.place}")
    folder = mounts.folder / "cache"
    words = ("precompute", undisturbed.config, f"cache.dir={folder}")
    filler = fill_up(mounts.folder, room)
    told = pipe(logs, *words, prepare=no_look_ahead).error()
    assert not (folder / "manifest.json").exists()
    filler.unlink()
    assert pipe(logs, *words).status == 0
    assert undisturbed.holds(folder)
    mounts.do(f"umount {mounts.place}")
    return told


@pytest.mark.parametrize("points", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_on_a_full_disk_it_says_so_and_goes_on_when_there_is_room(
    undisturbed: Undisturbed, mounts: Mounts, tmp_path: Path, points: int
) -> None:
    rng = random.Random(points)
    whole, texts = bytes_on_disk(undisturbed, mounts, tmp_path)
    parts = whole - texts
    rooms = [parts * (point + rng.random()) / points for point in range(points)]
    rooms += [parts + texts * (point + rng.random()) / points for point in range(points)]
    if points > 1:
        rooms += [0, whole - PAGE]  # nothing at all; all but the last page of the manifest
    for room in rooms:
        told = run_full(undisturbed, mounts, int(room), tmp_path)
        assert "No space left on device" in told
        assert "run the same command again" in told
        assert str(mounts.folder / "cache") in told


def test_too_small_a_disk_is_refused_before_anything_is_begun(data_set: Path, mounts: Mounts, tmp_path: Path) -> None:
    mounts.do(f"mount -t tmpfs -o size=128k tmpfs {mounts.place}")
    folder = mounts.folder / "caches" / "mine"
    told = pipe(tmp_path, "precompute", data_set / "config.yaml", f"cache.dir={folder}").error()
    assert re.search(r"24 images .*need \d+\.\d\d MB, but only \d+\.\d\d MB are free\. Free disk", told)
    assert f"pipe: {folder}: " in told
    assert not folder.parent.exists()


@pytest.mark.parametrize("begun", [False, True])
def test_a_read_only_disk_is_told_in_a_line(data_set: Path, mounts: Mounts, tmp_path: Path, begun: bool) -> None:
    mounts.do(f"mount -t tmpfs -o size=8m tmpfs {mounts.place}")
    words = ("precompute", data_set / "config.yaml", f"cache.dir={mounts.folder}/cache")
    if begun:
        assert pipe(tmp_path, *words).status == 0
    mounts.do(f"mount -o remount,ro {mounts.place}")
    told = pipe(tmp_path, *words).error()
    assert told.startswith(f"pipe: {mounts.folder}/cache: ")
    assert "Read-only file system" in told
    assert "run the same command again" in told
    mounts.do(f"mount -o remount,rw {mounts.place}")
    assert pipe(tmp_path, *words).status == 0


@pytest.mark.parametrize("how", ["deleted", "unmounted"])
def test_a_folder_that_vanishes_is_told_in_a_line(data_set: Path, mounts: Mounts, tmp_path: Path, how: str) -> None:
    mounts.do(f"mount -t tmpfs -o size=8m tmpfs {mounts.place}")
    folder = mounts.folder / "cache"
    words = ("precompute", data_set / "config.yaml", f"cache.dir={folder}", "cache.part_rows=10")
    with started(tmp_path, *words, prepare=slow_pictures) as running:
        wait_for_part(folder, running)
        if how == "deleted":
            shutil.rmtree(folder)
        else:
            mounts.do(f"umount -l {mounts.place}")
        told = running.ended().error()
    assert told.startswith(f"pipe: {folder}")
    assert "No such file or directory" in told
