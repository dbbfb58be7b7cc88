"""Caches written by the first program of each format version stay readable."""

import hashlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from cache_fakes import digests, features, spec, stored_rows, table, texts_of, to_write, write_some

from cache.audit import verify
from cache.reader import FeatureReader
from cache.spec import CacheError
from cache.writer import FeatureWriter

FIXTURES = Path(__file__).parent / "fixtures"
V1 = FIXTURES / "v1"
WANTED = digests(5)


@pytest.mark.parametrize("io", ["memmap", "pread"])
def test_finished_version_1_cache_is_read(io):
    with FeatureReader(V1 / "finished", io) as reader:
        assert reader.spec == spec()
        assert dict(reader.stored()) == {digest: row for row, digest in enumerate(WANTED) if row != 1}
        rows = [4, 0, 3, 2]
        np.testing.assert_array_equal(reader.gather(rows), features([WANTED[row] for row in rows], spec()))
        with pytest.raises(CacheError, match=r"row 1 .*never written"):
            reader.gather([1])
        found, made = reader.text("train"), table([4, 0, 2])
        assert found.image_row.tolist() == [4, 0, 2]
        assert (found.prompt, found.tokenizer) == (made.prompt, made.tokenizer)
        assert [found.record(i) for i in range(3)] == [made.record(i) for i in range(3)]
        for name in ("prompt_ids", "target_ids"):
            assert [row.tolist() for row in getattr(found, name)] == [row.tolist() for row in getattr(made, name)]
        assert reader.attachment("left-out.jsonl").read_bytes() == b'{"reason": "not a picture", "row": 1}\n'
        assert reader.manifest.provenance == {"model": "fake"}
    assert verify(V1 / "finished").damage == []


def test_unfinished_version_1_cache_is_resumed(tmp_path):
    folder, kind = tmp_path / "cache", spec("bfloat16")
    shutil.copytree(V1 / "unfinished", folder)
    with FeatureWriter(folder, kind, WANTED[:3]) as writer:
        assert to_write(writer) == [WANTED[2], WANTED[1]]  # unwritten rows first, then failed ones
        assert write_some(writer) == [WANTED[2], WANTED[1]]
        writer.finish(texts_of(writer, WANTED[:3]))
    assert stored_rows(folder, kind) == set(WANTED[:3])


def test_finished_version_1_cache_is_extended(tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(V1 / "finished", folder)
    with FeatureWriter(folder, spec(), digests(7)) as writer:
        assert write_some(writer) == [WANTED[1], *digests(2, start=5)]
        writer.finish(texts_of(writer, digests(7)))
    assert stored_rows(folder, spec()) == set(digests(7))


def test_fixture_script_recreates_the_fixture(tmp_path, monkeypatch):
    """Otherwise the fixtures would no longer represent the format."""
    monkeypatch.syspath_prepend(FIXTURES)
    monkeypatch.delitem(sys.modules, "make_v1", raising=False)
    import make_v1

    make_v1.make_finished(tmp_path / "finished")
    with FeatureReader(tmp_path / "finished") as now, FeatureReader(V1 / "finished") as then:
        assert (now.spec, now.splits, now.rows) == (then.spec, then.splits, then.rows)
        np.testing.assert_array_equal(now.gather([0, 2, 3, 4]), then.gather([0, 2, 3, 4]))
        assert [(part.file, part.rows) for part in now.manifest.parts] == [
            (part.file, part.rows) for part in then.manifest.parts
        ]


def test_fixture_checksums_match():
    for path in V1.glob("*/*.json"):
        body, end = path.read_bytes().rsplit(b',\n  "sha256": "', 1)
        assert end == hashlib.sha256(body).hexdigest().encode() + b'"\n}\n', path
