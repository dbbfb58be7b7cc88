"""A cached fingerprint is used until a file changes."""

import os
from pathlib import Path

import pytest

from pipeline.blip2 import checkpoint
from pipeline.blip2.checkpoint import ENCODER_PREFIXES, fingerprint
from pipeline.blip2.embedded import embedded_checkpoint
from pipeline.common import fingerprint_cache as remembered


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the checkpoint that appears old, and an empty cache of fingerprints."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memory"))
    monkeypatch.setattr(remembered, "RACY_SECONDS", 0)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in embedded_checkpoint().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def count_readings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Path]]:
    """Record the files whose tensors are read."""
    read: list[dict[str, Path]] = []
    real = checkpoint._fingerprint
    monkeypatch.setattr(checkpoint, "_fingerprint", lambda files: (read.append(files), real(files))[1])
    return read


def test_tensors_are_read_once(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = count_readings(monkeypatch)
    assert fingerprint(weights, ENCODER_PREFIXES) == fingerprint(weights, ENCODER_PREFIXES)
    assert len(readings) == 1


def test_changed_tensor_is_detected_with_the_same_size_and_time(weights: Path) -> None:
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


def test_fingerprint_of_a_recently_changed_file_is_not_cached(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "RACY_SECONDS", 3600)
    readings = count_readings(monkeypatch)
    fingerprint(weights, ENCODER_PREFIXES)
    fingerprint(weights, ENCODER_PREFIXES)
    assert len(readings) == 2


def test_nothing_is_cached_without_a_home_folder(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory")))
    assert fingerprint(weights, ENCODER_PREFIXES) == fingerprint(weights, ENCODER_PREFIXES)


def test_unwritable_cache_of_fingerprints_is_ignored(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    assert fingerprint(weights, ENCODER_PREFIXES) == fingerprint(embedded_checkpoint(), ENCODER_PREFIXES)
