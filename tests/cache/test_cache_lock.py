"""Locks of the writer, against a real second process."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from cache_fakes import build, contents, digests, put, spec, to_write, write_some

import cache.lock
from cache.lock import FolderLock, describe_holder
from cache.part import PartWriter
from cache.spec import CacheError
from cache.writer import FeatureWriter

WANTED = digests(8)
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def no_lock_timeout(monkeypatch):
    monkeypatch.setattr("cache.lock.LOCK_TIMEOUT_SECONDS", 0)


@contextmanager
def another_process(script):
    """Run a script in another process until the context ends, then kill it with SIGKILL."""
    setup = "import sys; from cache_fakes import *\n"
    wait = "\nprint('ready', flush=True); sys.stdin.read()"
    env = os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}
    command = [sys.executable, "-c", setup + script + wait]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as child:
        try:
            assert child.stdout.readline() == b"ready\n"
            yield child
        finally:
            child.send_signal(signal.SIGKILL)


def test_second_writer_error_names_the_holder(tmp_path):
    script = f"writer = FeatureWriter(Path({str(tmp_path)!r}), spec(), digests(8))"
    with another_process(script) as child:
        holder = rf"process {child.pid} on {socket.gethostname()} \(since 2\d\d\d-\d\d-\d\d \d\d:\d\d:\d\d.*\)"
        with pytest.raises(
            CacheError, match=rf"{holder} is writing this cache\. Run the command again when it has finished"
        ):
            FeatureWriter(tmp_path, spec(), WANTED)
        before = contents(tmp_path)
    FeatureWriter(tmp_path, spec(), WANTED).close()  # the holder was killed
    assert contents(tmp_path) == before | {".lock": b""}


def test_second_writer_in_same_process_is_rejected(tmp_path):
    with FeatureWriter(tmp_path, spec(), WANTED), pytest.raises(CacheError, match=f"process {os.getpid()} on"):
        FeatureWriter(tmp_path, spec(), WANTED)
    FeatureWriter(tmp_path, spec(), WANTED).close()


def test_writer_that_fails_to_start_releases_lock(tmp_path):
    build(tmp_path, WANTED)
    with pytest.raises(CacheError, match="another spec") as caught:
        FeatureWriter(tmp_path, spec("float32"), WANTED)
    assert caught.tb  # which keeps the writer alive
    FeatureWriter(tmp_path, spec(), WANTED).close()


def test_second_writer_waits_for_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr("cache.lock.LOCK_TIMEOUT_SECONDS", 30)
    first = FolderLock(tmp_path)
    monkeypatch.setattr("time.sleep", lambda _: first.release())
    FolderLock(tmp_path).release()


@pytest.mark.parametrize("content", [b"", b" {", b" []", b' {"process": 3}', b" \xff"])
def test_describe_holder_without_valid_name(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    assert describe_holder(tmp_path) == "another process"


def test_file_system_without_locks_is_used_unlocked(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(38, "Function not implemented")))
    assert build(tmp_path, WANTED) == WANTED


def test_part_written_by_another_process_is_rejected(tmp_path):
    with FeatureWriter(tmp_path, spec(), WANTED, part_rows=3) as writer:
        first, second = writer.parts[:2]
        with another_process(f"part = PartWriter(Path({str(first)!r}))"):
            with pytest.raises(CacheError, match=r"features-00000\.h5\.partial: another process is writing this part"):
                PartWriter(first)
            with PartWriter(second) as part:
                put(part, 0)
            assert to_write(writer) == [*WANTED[:3], *WANTED[4:]]  # inspecting a part is possible while it is written
        with PartWriter(first) as part:  # the other process was killed
            assert part.unwritten_rows.tolist() == [0, 1, 2]


def test_sigkill_loses_only_uncommitted_rows(tmp_path):
    build(tmp_path / "whole", WANTED)
    folder = tmp_path / "cache"
    script = (
        f"writer = FeatureWriter(Path({str(folder)!r}), spec(), digests(8), 3)\n"
        "write_some(writer, limit=4); part = PartWriter(writer.parts[2]); put(part, 0); part.commit(); put(part, 1)"
    )
    with another_process(script):
        pass
    with FeatureWriter(folder, spec(), WANTED, 3) as writer:
        assert (writer.reused, to_write(writer)) == (5, [WANTED[4], WANTED[5], WANTED[7]])
        assert write_some(writer) == [WANTED[4], WANTED[5], WANTED[7]]
    assert build(folder, WANTED) == []
    assert contents(folder) == contents(tmp_path / "whole")


def test_lock_file_removed_while_waiting_is_recreated(tmp_path, monkeypatch):
    monkeypatch.setattr("cache.lock.LOCK_TIMEOUT_SECONDS", 30)
    (tmp_path / ".lock").touch()
    try_lock = cache.lock.try_lock
    removed = []

    def remove_first(descriptor):
        if not removed:
            removed.append((tmp_path / ".lock").unlink())
        return try_lock(descriptor)

    monkeypatch.setattr("cache.lock.try_lock", remove_first)
    first = FolderLock(tmp_path)
    monkeypatch.setattr("cache.lock.LOCK_TIMEOUT_SECONDS", 0)
    with pytest.raises(CacheError, match="is writing this cache"):
        FolderLock(tmp_path)
    first.release()


def test_lock_is_released_if_its_file_cannot_be_truncated(tmp_path, monkeypatch):
    first = FolderLock(tmp_path)
    monkeypatch.setattr("os.ftruncate", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    first.release()
    FolderLock(tmp_path).release()
