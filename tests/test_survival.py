"""Stage one survives kills, signals, full disks and lost folders: it names the cause, and the next run resumes.

The resulting cache is, byte for byte, that of an undisturbed run.
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
from processes import TIMEOUT, Finished, Mounts, Running, contents, pipe, started

import cache.part
import pipeline.encoding.encoding_loop
import pipeline.encoding.preflight
from cache.audit import verify
from cache.format import NOT_WRITTEN, PART_NAME, inspect_part
from cache.hdf5 import PAGE
from pipeline.encoding.images import read_image_bytes

NUM_IMAGES = 52
PART_ROWS = 10  # six parts; in the last, with two rows, no image can be decoded
BROKEN = (5, 17, 18, 47, 51)


@dataclass(frozen=True)
class Undisturbed:
    """A dataset, and the cache and duration of an undisturbed stage one."""

    config: Path
    files: dict[str, bytes]
    seconds: float

    def matches(self, folder: Path) -> bool:
        """Return whether a cache has the same bytes and no damage."""
        return contents(folder) == self.files and not verify(folder).damage


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_data_set(folder, NUM_IMAGES)
    for number in BROKEN:
        image = folder / "images" / f"{number}.png"
        image.write_bytes(image.read_bytes()[:-200])  # its header is valid
    settings = {"batch_size": 4, "num_workers": 2, "dtype": "float32", "on_invalid": "skip"}
    dirs = {"dir": f"{folder}/cache", "dtype": "float32", "part_rows": PART_ROWS}
    config = write_config(folder, cache=dirs, precompute=settings)
    for name in ("first", "timed"):  # the first run also starts the server process of the forks
        began = time.perf_counter()
        whole = folder / name / "cache"  # separate parents: rows are copied from sibling caches
        assert pipe(folder, "precompute", config, f"cache.dir={whole}", prepare=commit_always).status == 0
        seconds = time.perf_counter() - began
    assert contents(whole) == contents(folder / "first" / "cache")
    assert sum(name.startswith("features") for name in contents(whole)) == 5
    return Undisturbed(config, contents(whole), seconds)


def commit_always() -> None:
    """Commit after every batch, so that a kill leaves some rows."""
    cache.part.COMMIT_SECONDS = 0.0


def slow_images() -> None:
    """Read images slowly, so that a signal arrives while they are encoded."""

    def read(path: Path) -> bytes:
        time.sleep(0.05)
        return read_image_bytes(path)

    commit_always()
    pipeline.encoding.encoding_loop.read_image_bytes = read


def no_disk_space_check() -> None:
    """Skip the check of disk space, as if another program had filled the disk after it."""
    commit_always()
    pipeline.encoding.preflight.check_disk_space = lambda *_: None  # type: ignore[assignment]


def rows_done(folder: Path) -> int | None:
    """Return the number of rows written or marked as failed; None if the cache is finished or not started."""
    if not folder.exists() or (folder / "manifest.json").exists():
        return None
    parts = [inspect_part(path) for path in folder.iterdir() if PART_NAME.fullmatch(path.name)]
    return sum(int((part.crc32 != NOT_WRITTEN).sum()) for part in parts)


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_times_it_resumes_to_the_same_cache(
    undisturbed: Undisturbed, tmp_path: Path, kills: int
) -> None:
    rng = random.Random(kills)
    rows_left: list[int | None] = []
    for kill in range(kills):
        folder = tmp_path / str(kill) / "cache"
        words = ("precompute", undisturbed.config, f"cache.dir={folder}")
        for _ in range(rng.choice([1, 1, 2])):
            with started(tmp_path, *words, prepare=commit_always) as running:
                running.process.join(rng.uniform(0, undisturbed.seconds))
                running.process.kill()
            rows_left.append(rows_done(folder))
        assert pipe(tmp_path, *words).status == 0
        assert undisturbed.matches(folder), f"after kill {len(rows_left)}"
    unfinished = [rows for rows in rows_left if rows is not None]
    assert len(unfinished) >= len(rows_left) / 5, f"few kills came during the run: {rows_left}"
    assert kills < 50 or sum(0 < rows < NUM_IMAGES for rows in unfinished) >= 5, (
        f"hardly any kill between rows: {rows_left}"
    )


def wait_for_part(folder: Path, running: Running) -> None:
    """Wait until the first part is complete."""
    while not (folder / "features-00000.h5").exists():
        assert running.process.is_alive(), running.err
        time.sleep(0.01)


def test_ctrl_c_is_one_line_and_the_same_command_resumes(undisturbed: Undisturbed, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    words = ("precompute", undisturbed.config, f"cache.dir={folder}")
    with started(tmp_path, *words, prepare=slow_images) as running:
        wait_for_part(folder, running)
        os.kill(running.process.pid or 0, signal.SIGINT)
        error = running.wait().error()
    assert "Interrupted. Completed work is saved. Rerun the command" in error
    assert PART_ROWS <= (rows_done(folder) or 0) < NUM_IMAGES
    assert pipe(tmp_path, *words).status == 0
    assert undisturbed.matches(folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_real_command(undisturbed: Undisturbed, tmp_path: Path, number: signal.Signals) -> None:
    for attempt in range(5):  # on a busy machine the signal may come after the end
        folder = tmp_path / str(attempt) / "cache"
        words = [Path(sys.executable).with_name("pipe"), "precompute", undisturbed.config, f"cache.dir={folder}"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            while not any(folder.glob("*.partial")) and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(number)
            out, err = process.communicate(timeout=TIMEOUT)
        if process.returncode != 0:
            break
    assert (out, "Traceback" in err) == ("", False)
    if number == signal.SIGINT:
        assert Finished(process.returncode, out, err).error().startswith("pipe: Interrupted")
    else:
        assert process.returncode == -signal.SIGTERM
    assert rows_done(folder) is not None
    assert subprocess.run([*words, "--json"], capture_output=True, check=False, timeout=TIMEOUT).returncode == 0
    assert undisturbed.matches(folder)


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    (tmp_path / "disk").mkdir()
    try:
        made = Mounts(tmp_path / "disk")
    except OSError as error:
        pytest.skip(f"mount namespaces are not permitted: {error}")
    yield made
    made.close()


def bytes_on_disk(undisturbed: Undisturbed, mounts: Mounts, logs: Path) -> tuple[int, int]:
    """Return the size of the finished cache on a small disk, and that of its files other than parts."""
    mounts.run(f"mount -t tmpfs -o size=8m tmpfs {mounts.place}")
    folder = mounts.folder / "cache"
    assert pipe(logs, "precompute", undisturbed.config, f"cache.dir={folder}").status == 0
    found = os.statvfs(folder)
    others = [path for path in folder.iterdir() if not PART_NAME.fullmatch(path.name)]
    sizes = (found.f_blocks - found.f_bfree) * found.f_frsize, sum(path.stat().st_blocks * 512 for path in others)
    mounts.run(f"umount {mounts.place}")
    return sizes


def fill_disk(disk: Path, free_bytes: int) -> Path:
    """Fill a disk except for `free_bytes`; return the file that takes the space."""
    found = os.statvfs(disk)
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - free_bytes)
    return disk / "filler"


def run_on_full_disk(undisturbed: Undisturbed, mounts: Mounts, free_bytes: int, logs: Path) -> str:
    """Run stage one on a disk with `free_bytes`, and again with more; return the error of the first run."""
    mounts.run(f"mount -t tmpfs -o size=8m tmpfs {mounts.place}")
    folder = mounts.folder / "cache"
    words = ("precompute", undisturbed.config, f"cache.dir={folder}")
    filler = fill_disk(mounts.folder, free_bytes)
    error = pipe(logs, *words, prepare=no_disk_space_check).error()
    assert not (folder / "manifest.json").exists()
    filler.unlink()
    assert pipe(logs, *words).status == 0
    assert undisturbed.matches(folder)
    mounts.run(f"umount {mounts.place}")
    return error


@pytest.mark.parametrize("points", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_full_disk_is_an_error_and_the_run_resumes_with_more_space(
    undisturbed: Undisturbed, mounts: Mounts, tmp_path: Path, points: int
) -> None:
    rng = random.Random(points)
    whole, texts = bytes_on_disk(undisturbed, mounts, tmp_path)
    parts = whole - texts
    free = [parts * (point + rng.random()) / points for point in range(points)]
    free += [parts + texts * (point + rng.random()) / points for point in range(points)]
    if points > 1:
        free += [0, whole - PAGE]  # no space; all but the last page of the manifest
    for free_bytes in free:
        error = run_on_full_disk(undisturbed, mounts, int(free_bytes), tmp_path)
        assert "No space left on device" in error
        assert "run the same command again" in error
        assert str(mounts.folder / "cache") in error


def test_too_small_a_disk_is_an_error_before_the_start(data_set: Path, mounts: Mounts, tmp_path: Path) -> None:
    mounts.run(f"mount -t tmpfs -o size=128k tmpfs {mounts.place}")
    folder = mounts.folder / "caches" / "mine"
    error = pipe(tmp_path, "precompute", data_set / "config.yaml", f"cache.dir={folder}").error()
    assert re.search(r"24 images .*need \d+\.\d\d MB, but only \d+\.\d\d MB are free\. Free disk", error)
    assert f"pipe: {folder}: " in error
    assert not folder.parent.exists()


@pytest.mark.parametrize("started_before", [False, True])
def test_read_only_disk_is_a_one_line_error(
    data_set: Path, mounts: Mounts, tmp_path: Path, started_before: bool
) -> None:
    mounts.run(f"mount -t tmpfs -o size=8m tmpfs {mounts.place}")
    words = ("precompute", data_set / "config.yaml", f"cache.dir={mounts.folder}/cache")
    if started_before:
        assert pipe(tmp_path, *words).status == 0
    mounts.run(f"mount -o remount,ro {mounts.place}")
    error = pipe(tmp_path, *words).error()
    assert error.startswith(f"pipe: {mounts.folder}/cache: ")
    assert "Read-only file system" in error
    assert "run the same command again" in error
    mounts.run(f"mount -o remount,rw {mounts.place}")
    assert pipe(tmp_path, *words).status == 0


@pytest.mark.parametrize("how", ["deleted", "unmounted"])
def test_lost_folder_is_a_one_line_error(data_set: Path, mounts: Mounts, tmp_path: Path, how: str) -> None:
    mounts.run(f"mount -t tmpfs -o size=8m tmpfs {mounts.place}")
    folder = mounts.folder / "cache"
    words = ("precompute", data_set / "config.yaml", f"cache.dir={folder}", "cache.part_rows=10")
    with started(tmp_path, *words, prepare=slow_images) as running:
        wait_for_part(folder, running)
        if how == "deleted":
            shutil.rmtree(folder)
        else:
            mounts.run(f"umount -l {mounts.place}")
        error = running.wait().error()
    assert error.startswith(f"pipe: {folder}")
    assert "No such file or directory" in error
