"""A remembered digest is used while the files are as they were, and never after."""

import os
from pathlib import Path

import pytest

from pipeline.blip2 import checkpoint
from pipeline.blip2.checkpoint import ENCODER_PREFIXES, fingerprint
from pipeline.blip2.embedded import embedded_checkpoint
from pipeline.common import fingerprint_cache as remembered


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of its own that seems to be old, and an empty memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memory"))
    monkeypatch.setattr(remembered, "RACY_SECONDS", 0)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in embedded_checkpoint().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def count_readings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Path]]:
    """What the tensors were read of, at each time."""
    read: list[dict[str, Path]] = []
    real = checkpoint._fingerprint
    monkeypatch.setattr(checkpoint, "_fingerprint", lambda files: (read.append(files), real(files))[1])
    return read


def test_the_tensors_are_read_once(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = count_readings(monkeypatch)
    assert fingerprint(weights, ENCODER_PREFIXES) == fingerprint(weights, ENCODER_PREFIXES)
    assert len(readings) == 1


def test_a_changed_tensor_is_noticed_though_size_and_time_are_the_same(weights: Path) -> None:
    before = fingerprint(weights, ENCODER_PREFIXES)
    path = weights / "model.safetensors"
    found = path.stat()
    data = bytearray(path.read_bytes())
    data[-3] ^= 1  # the last tensor by position may be of either half: change one of each
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (found.st_size, found.st_mtime_ns)
    assert fingerprint(weights, ENCODER_PREFIXES) != before


def test_nothing_is_remembered_of_a_file_changed_a_moment_ago(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "RACY_SECONDS", 3600)
    readings = count_readings(monkeypatch)
    fingerprint(weights, ENCODER_PREFIXES)
    fingerprint(weights, ENCODER_PREFIXES)
    assert len(readings) == 2


def test_without_a_home_there_is_no_memory(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory")))
    assert fingerprint(weights, ENCODER_PREFIXES) == fingerprint(weights, ENCODER_PREFIXES)


def test_a_memory_that_cannot_be_written_is_done_without(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    assert fingerprint(weights, ENCODER_PREFIXES) == fingerprint(embedded_checkpoint(), ENCODER_PREFIXES)
