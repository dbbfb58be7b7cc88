import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cache_fakes import build, contents, digests, features, spec, table, write_some

from cache.format import inspect_part
from cache.reader import FeatureReader
from cache.spec import CacheError
from cache.writer import FeatureWriter

WANTED = digests(8)  # with 3 rows a part: two full parts and one of 2


class Killed(BaseException):
    pass


class Kill:
    """Counts system calls that change the disk and kills at the n-th; of a long write, half is done by then."""

    def __init__(self, monkeypatch, at=None):
        self.at, self.calls = at, 0
        for name in ("pwrite", "replace", "fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self._guarded(name, getattr(os, name)))

    def _guarded(self, name, call):
        def guarded(*args, **options):
            self.calls += 1
            if self.calls == self.at:
                if name == "pwrite" and len(args[1]) > 8:
                    call(args[0], args[1][: len(args[1]) // 2], args[2])
                raise Killed
            return None if "sync" in name else call(*args, **options)

        return guarded


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "cache"
    build(folder, WANTED)
    return contents(folder)


def test_kill_at_every_step_then_resume_gives_the_same_bytes(tmp_path):
    wanted = WANTED[:5]
    with pytest.MonkeyPatch.context() as patch:
        steps = Kill(patch)
        build(tmp_path / "whole", wanted)
    assert steps.calls > 40
    for step in range(1, steps.calls + 1):
        folder = tmp_path / str(step)
        with pytest.MonkeyPatch.context() as patch:
            Kill(patch, at=step)
            with pytest.raises(Killed):
                build(folder, wanted)
        with pytest.MonkeyPatch.context() as patch:
            Kill(patch)
            build(folder, wanted)
        assert contents(folder) == contents(tmp_path / "whole"), f"killed at step {step}"


@pytest.mark.parametrize("count", range(9))
def test_resume_writes_only_the_rest(tmp_path, whole, count):
    with FeatureWriter(tmp_path, spec(), WANTED, part_rows=3) as writer:
        write_some(writer, limit=count)
    with FeatureWriter(tmp_path, spec(), WANTED, part_rows=3) as writer:
        assert (writer.reused, writer.pending) == (count, WANTED[count:])
    assert build(tmp_path, WANTED) == WANTED[count:]
    assert contents(tmp_path) == whole


def test_kill_minus_nine(tmp_path, whole):
    script = (
        "import sys, time; from pathlib import Path; from cache_fakes import *\n"
        f"with FeatureWriter(Path({str(tmp_path)!r}), spec(), digests(8), 3) as writer:\n"
        "    write_some(writer, limit=4); print('ready', flush=True); time.sleep(60)\n"
    )
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{here}:{here.parents[1]}"}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=env) as child:
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert build(tmp_path, WANTED) == WANTED[4:]
    assert contents(tmp_path) == whole


def test_extension_encodes_only_what_is_new(tmp_path):
    build(tmp_path, WANTED)
    before = contents(tmp_path)
    more = digests(5, start=6)
    with FeatureWriter(tmp_path, spec(), more, part_rows=3) as writer:
        assert write_some(writer, limit=2) == more[2:4]
    with FeatureReader(tmp_path) as reader:  # not finished again: still the old cache
        assert set(reader.digests()) == set(WANTED)
        assert len(reader.text("train")) == len(WANTED)
    assert build(tmp_path, more) == more[4:]
    assert all(contents(tmp_path)[name] == data for name, data in before.items() if name.startswith("features"))
    with FeatureReader(tmp_path) as reader:
        rows = reader.digests()
        assert set(rows) == {*WANTED, *more}
        np.testing.assert_array_equal(reader.gather([rows[d] for d in more]), features(more, spec()))


def test_duplicates_are_stored_once(tmp_path):
    with FeatureWriter(tmp_path, spec(), [*WANTED, *WANTED[:3]], part_rows=3) as writer:
        assert writer.pending == WANTED


def test_part_in_work_comes_first_and_in_its_own_order(tmp_path):
    with FeatureWriter(tmp_path, spec(), WANTED, part_rows=4) as writer:
        write_some(writer, limit=2)
    with FeatureWriter(tmp_path, spec(), WANTED[::-1], part_rows=4) as writer:
        assert writer.pending == [WANTED[2], WANTED[3], *WANTED[:3:-1]]


def test_unwanted_rest_of_a_part_becomes_holes(tmp_path):
    with FeatureWriter(tmp_path, spec(), WANTED[:4], part_rows=4) as writer:
        write_some(writer, limit=2)
    wanted = [WANTED[0], WANTED[2], WANTED[5]]  # without WANTED[3], for which the part waits
    assert build(tmp_path, wanted) == [WANTED[2], WANTED[5]]
    assert inspect_part(tmp_path / "features-00000.h5").crc32.tolist()[2:] == [-1, -1]
    with FeatureReader(tmp_path) as reader:
        assert reader.digests() == {WANTED[0]: 0, WANTED[1]: 1, WANTED[2]: 4, WANTED[5]: 5}
        assert reader.rows == 4
        np.testing.assert_array_equal(reader.gather([5, 0]), features([WANTED[5], WANTED[0]], spec()))
        with pytest.raises(CacheError, match="row 3 was never written"):
            reader.gather([0, 3])


def test_part_without_any_row_is_dropped(tmp_path, monkeypatch):
    with FeatureWriter(tmp_path, spec(), WANTED[:3]) as writer:
        monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(Killed) if writer._part else real(*_))
        with pytest.raises(Killed):
            write_some(writer)
    assert [path.name for path in tmp_path.iterdir()] == ["features-00000.h5.partial"]
    monkeypatch.undo()
    build(tmp_path, WANTED[4:6])
    with FeatureReader(tmp_path) as reader:
        assert reader.digests() == {WANTED[4]: 0, WANTED[5]: 1}


real = os.pwrite


def test_other_spec_is_refused_in_words(tmp_path):
    build(tmp_path, WANTED)
    before = contents(tmp_path)
    with pytest.raises(CacheError, match="dtype: cache has float16, wanted float32") as caught:
        FeatureWriter(tmp_path, spec("float32"), WANTED)
    assert "cache.dir" in str(caught.value)
    assert f"delete the folder {tmp_path} " in str(caught.value)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(CacheError, match=r"features-00000\.h5.*another kind"):
        FeatureWriter(tmp_path, spec("float32"), WANTED)
    del before["manifest.json"]
    assert contents(tmp_path) == before


def test_full_disk_says_what_is_needed_and_goes_on(tmp_path, whole, monkeypatch):
    with FeatureWriter(tmp_path, spec(), WANTED, part_rows=3) as writer:
        write_some(writer, limit=2)
        monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(CacheError, match=r"No space left.* 6 images still to come need 120 bytes.*same command"):
            write_some(writer)
    monkeypatch.undo()
    assert build(tmp_path, WANTED) == WANTED[2:]
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_infinite_features_are_refused_by_name(tmp_path, dtype):
    kind = spec(dtype)
    values = features(WANTED[:2], kind)
    values[1, 0, 3] = {"bfloat16": 0xFF80}.get(dtype, np.inf)
    with FeatureWriter(tmp_path, kind, WANTED) as writer:
        with pytest.raises(CacheError, match=WANTED[1].hex()):
            writer.write(WANTED[:2], values)
        assert writer.pending == WANTED


def test_wrong_features_are_refused(tmp_path):
    with FeatureWriter(tmp_path, spec(), WANTED) as writer:
        with pytest.raises(CacheError, match="float32"):
            writer.write(WANTED[:2], features(WANTED[:2], spec("float32")))
        with pytest.raises(CacheError, match=r"\(3, 2, 5\)"):
            writer.write(WANTED[:2], features(WANTED[:3], spec()))
        with pytest.raises(AssertionError, match="order"):
            writer.write(WANTED[1:2], features(WANTED[1:2], spec()))


def test_finish_wants_everything_and_sound_text(tmp_path):
    with FeatureWriter(tmp_path, spec(), WANTED) as writer:
        with pytest.raises(AssertionError, match="8 images"):
            writer.finish({}, {})
        write_some(writer)
        with pytest.raises(CacheError, match="image_row"):
            writer.finish({"train": table([0, 8])}, {})
        with pytest.raises(CacheError, match=r"\.\./x"):
            writer.finish({"../x": table([0])}, {})
    assert not (tmp_path / "manifest.json").exists()


def test_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CacheError, match=r"thesis\.txt"):
        FeatureWriter(tmp_path, spec(), WANTED)
    with pytest.raises(CacheError, match="not a folder"):
        FeatureWriter(tmp_path / "thesis.txt", spec(), WANTED)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_deleted_part_is_made_anew_under_another_name(tmp_path):
    build(tmp_path, WANTED)
    (tmp_path / "features-00002.h5").unlink()
    assert build(tmp_path, WANTED) == WANTED[6:]
    assert (tmp_path / "features-00003.h5").exists()
    with FeatureReader(tmp_path) as reader:
        np.testing.assert_array_equal(reader.gather(reader.text("train").image_row), features(WANTED, spec()))


def test_a_second_writer_is_refused_and_a_dead_ones_lock_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr("cache.writer.LOCK_PATIENCE", 0)
    folder = tmp_path / "cache"
    first = FeatureWriter(folder, spec(), WANTED)
    with pytest.raises(CacheError, match="another process is writing this cache"):
        FeatureWriter(folder, spec(), WANTED)
    first.close()
    FeatureWriter(folder, spec(), WANTED).close()
    code = (
        f"import os, cache.writer as w, pathlib; fd = w._lock(pathlib.Path({str(folder)!r})); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    FeatureWriter(folder, spec(), WANTED).close()
