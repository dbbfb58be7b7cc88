"""A cache in use by a reader cannot be removed or repaired, but it can be extended."""

import gc
import multiprocessing
import os
import pickle
import shutil
import socket
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import cache.lock
import cache.portability
from cache.lock import ReadLock, exclude_readers
from cache.reader import FeatureReader
from cache.spec import CacheError
from pipeline.cli import main
from pipeline.config import Config

_FORK = multiprocessing.get_context("forkserver")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache.lock.LOCK_TIMEOUT_SECONDS", 0)


@pytest.fixture
def folder(cached: Config, tmp_path: Path) -> Path:
    """A copy of the cache that the test may change."""
    return Path(shutil.copytree(cached.cache.dir, tmp_path / "cache"))


def remove(folder: Path) -> Result:
    return CliRunner().invoke(main, ["cache", "rm", str(folder), "--yes"])


def _read(folder: Path, opened: Event, done: Event) -> None:
    with FeatureReader(folder):
        opened.set()
        done.wait(60)


@pytest.fixture
def reading(folder: Path) -> Iterator[int]:
    """Read the cache in another process; return its ID."""
    opened, done = _FORK.Event(), _FORK.Event()
    process = _FORK.Process(target=_read, args=(folder, opened, done))
    process.start()
    try:
        assert opened.wait(60)
        yield process.pid or 0
    finally:
        done.set()
        process.join()


def test_cache_read_by_another_process_is_not_removed(folder: Path, reading: int) -> None:
    before = sorted(folder.iterdir())
    done = remove(folder)
    assert done.exit_code == 1
    assert f"process {reading} on {socket.gethostname()} is reading this cache" in done.stderr
    assert "Nothing was changed; remove the cache when that process has finished" in done.stderr
    assert sorted(folder.iterdir()) == before


def test_cache_read_by_another_process_is_not_repaired(folder: Path, reading: int) -> None:
    part = next(folder.glob("features-*.h5"))
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    done = CliRunner().invoke(main, ["cache", "repair", str(folder)])
    assert done.exit_code == 1
    assert "is reading this cache" in done.stderr
    assert part.read_bytes() == data


def test_read_lock_is_released_on_close_and_taken_again_by_gather(folder: Path) -> None:
    reader = FeatureReader(folder)
    with pytest.raises(CacheError, match=f"process {os.getpid()} on"), exclude_readers(folder, "remove"):
        pass
    reader.close()
    with exclude_readers(folder, "remove"):
        with pytest.raises(CacheError, match="is removing or repairing this cache"):
            FeatureReader(folder)
        with pytest.raises(CacheError, match="is removing or repairing this cache"):
            reader.gather(np.zeros(1, np.int64))
    reader.gather(np.zeros(1, np.int64))
    copy = pickle.loads(pickle.dumps(reader))
    assert remove(folder).exit_code == 1
    del reader
    gc.collect()
    copy.gather(np.zeros(1, np.int64))
    assert remove(folder).exit_code == 1, "an unpickled copy holds the lock too"
    del copy
    gc.collect()
    assert remove(folder).exit_code == 0
    assert not folder.exists()


def test_cache_in_use_can_be_extended_and_read_by_others(folder: Path) -> None:
    with FeatureReader(folder), FeatureReader(folder):
        lock = cache.lock.FolderLock(folder)
        lock.release()


@pytest.mark.parametrize("number", cache.portability._NO_LOCKS)
def test_cache_works_on_a_file_system_without_locks(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with FeatureReader(folder) as reader:
        reader.gather(np.zeros(1, np.int64))
        assert remove(folder).exit_code == 0


def test_reading_writes_nothing(folder: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}
    with FeatureReader(folder):
        assert {path.name: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]} == before


def test_read_lock_of_a_missing_folder_does_nothing(tmp_path: Path) -> None:
    ReadLock(tmp_path / "none").release()
