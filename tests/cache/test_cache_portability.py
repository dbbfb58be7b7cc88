"""The cache without POSIX calls: the fallbacks give the same files."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cache_fakes import build, contents, digests, features, spec

from cache import portability
from cache.audit import verify
from cache.reader import FeatureReader

HERE = Path(__file__).parent
WANTED = digests(8)
SCRIPT = """
from without_posix import take_away_posix
take_away_posix()

import os, sys
from pathlib import Path
import numpy as np
from cache_fakes import *
from cache import portability
from cache.audit import verify
from cache.inventory import describe, remove
from cache.repair import drop_damaged

assert portability.fcntl is None and portability.resource is None and not hasattr(os, "pwrite")
folder, wanted = Path(sys.argv[1]), digests(8)
with FeatureWriter(folder, spec(), wanted, 3) as writer:
    write_some(writer, limit=4)
assert build(folder, wanted) == wanted[4:]
for io in ("memmap", "pread"):
    with FeatureReader(folder, io) as reader:
        np.testing.assert_array_equal(reader.gather([7, 0, 3, 3]), features([wanted[i] for i in (7, 0, 3, 3)], spec()))
assert verify(folder).damage == []
assert describe(folder).bytes > 0

copy = folder.with_name("copy")
build(copy, wanted, sources=[folder])
flip(copy / "features-00001.h5", inspect_part(copy / "features-00001.h5").features_offset)
assert drop_damaged(copy, verify(copy).damage) == 1
assert build(copy, wanted) == [wanted[3]]
remove(copy)
assert not copy.exists()
"""


@pytest.fixture
def without_posix(monkeypatch):
    """Take the calls away from the module in this process."""
    monkeypatch.setattr(portability, "fcntl", None)
    monkeypatch.setattr(portability, "resource", None)
    for name in ("pwrite", "preadv", "posix_fadvise", "fdatasync", "major"):
        monkeypatch.delattr(os, name, raising=False)


def test_cache_works_without_posix_calls(tmp_path):
    env = os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT, tmp_path / "cache"], env=env, check=True)
    build(tmp_path / "expected", WANTED)
    assert contents(tmp_path / "cache") == contents(tmp_path / "expected")


def test_cache_works_as_on_windows(tmp_path, without_posix, monkeypatch):
    monkeypatch.setattr(portability, "CAN_RENAME_OPEN_FILES", False)
    monkeypatch.setattr(portability, "MAPS_KEEP_FILES_OPEN", True)
    monkeypatch.setattr(portability, "open_folder", lambda folder: None)
    build(tmp_path, WANTED)
    with FeatureReader(tmp_path) as reader:
        np.testing.assert_array_equal(reader.gather(np.arange(8)), features(WANTED, spec()))
    assert verify(tmp_path).damage == []


def test_fallbacks_write_and_read_at_an_offset(tmp_path, without_posix):
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    descriptor = os.open(path, os.O_RDWR)
    try:
        assert portability.pwrite(descriptor, memoryview(b"ab"), 4) == 2
        data = bytearray(4)
        assert portability.pread_into(descriptor, memoryview(data), 3) == 4
        assert data == b"3ab6"
        assert portability.pread_into(descriptor, memoryview(data), 8) == 2
        assert portability.pread_into(descriptor, memoryview(data), 10) == 0
        portability.fdatasync(descriptor)
        portability.begin_flush(descriptor, 0, 10)
        assert portability.try_flock(descriptor)
        assert portability.describe_flock_holders(descriptor) == "another process"
    finally:
        os.close(descriptor)
    assert path.read_bytes() == b"0123ab6789"


def test_limits_have_defaults(without_posix):
    assert portability.max_open_files() == 512
    portability.fsync_folder(Path())


def test_no_other_module_calls_posix():
    modules = [*(HERE.parents[1] / "cache").glob("*.py"), *(HERE.parents[1] / "pipeline").rglob("*.py")]
    names = ("fcntl", "import resource", "ctypes", "os.pwrite", "os.pread", "posix_fadvise", "os.O_NONBLOCK",
             "os.O_NOCTTY", "os.O_DIRECTORY", "os.O_CLOEXEC", "os.fdatasync", "os.major", "st_blocks")  # fmt: skip
    assert len(modules) > 50
    for module in modules:
        if module.name != "portability.py":
            assert not [name for name in names if name in module.read_text()], module
