import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cache_fakes import build, digests, features, spec, write_some

from cache.format import inspect_part
from cache.reader import FeatureReader
from cache.spec import CacheError
from cache.writer import FeatureWriter

WANTED = digests(8)
ORDERS = [[0, 1, 2, 3, 4, 5, 6, 7], [7, 0, 3, 3, 5], [2, 0, 1], [], [4]]


@pytest.fixture
def folder(tmp_path):
    build(tmp_path / "cache", WANTED)
    return tmp_path / "cache"


def edit_manifest(folder, change):
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("io", ["memmap", "pread"])
def test_round_trip(tmp_path, dtype, io):
    build(tmp_path, WANTED, spec(dtype))
    with FeatureReader(tmp_path, io) as reader:
        assert (reader.spec, reader.rows, reader.splits) == (spec(dtype), 8, {"train": 8})
        assert reader.provenance == {"model": "fake"}
        assert reader.digests() == {digest: row for row, digest in enumerate(WANTED)}
        for order in ORDERS:
            found = reader.gather(np.asarray(order, np.int64))
            assert found.dtype == spec(dtype).storage_dtype
            np.testing.assert_array_equal(found, features([WANTED[i] for i in order], spec(dtype)))


@pytest.mark.parametrize("io", ["memmap", "pread"])
def test_a_used_reader_travels_to_another_process(folder, io):
    with FeatureReader(folder, io) as reader:
        reader.gather([0, 7])
        state = pickle.dumps(reader)
        assert len(state) < 20_000
        with pickle.loads(state) as copy:
            np.testing.assert_array_equal(copy.gather([7]), features(WANTED[7:], spec()))
        np.testing.assert_array_equal(reader.gather([7]), features(WANTED[7:], spec()))


@pytest.mark.parametrize("io", ["memmap", "pread"])
def test_flipped_bit_is_found_at_the_first_read(folder, io):
    path = folder / "features-00001.h5"
    layout = inspect_part(path)
    data = bytearray(path.read_bytes())
    data[layout.features_offset + layout.spec.row_bytes + 7] ^= 4
    path.write_bytes(data)
    with FeatureReader(folder, io) as reader:
        reader.gather([0, 1, 2, 3, 5, 6, 7])
        for _ in range(2):
            with pytest.raises(CacheError, match=r"features-00001\.h5: row 1 \(row 4 of the cache\).*precompute"):
                reader.gather([3, 4])


@pytest.mark.parametrize("row", [-1, 8])
def test_row_out_of_range(folder, row):
    with FeatureReader(folder) as reader, pytest.raises(CacheError, match=f"row {row} is not one of 8"):
        reader.gather([0, row])


def test_file_that_shrinks_under_pread_is_an_error(folder):
    with FeatureReader(folder, "pread") as reader:
        path = folder / "features-00000.h5"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(CacheError, match=r"features-00000\.h5: cannot be read"):
            reader.gather([0])


def test_missing_and_unfinished_cache(tmp_path):
    with pytest.raises(CacheError, match=r"no cache at .*absent: run `pipe precompute` first"):
        FeatureReader(tmp_path / "absent")
    with FeatureWriter(tmp_path, spec(), WANTED) as writer:
        write_some(writer, limit=3)
    with pytest.raises(CacheError, match=r"unfinished.*goes on where it stopped"):
        FeatureReader(tmp_path)


def test_manifest_that_is_no_json(folder):
    (folder / "manifest.json").write_text("{")
    with pytest.raises(CacheError, match=r"manifest\.json: cannot be used"):
        FeatureReader(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(format_version=2), "version 2, this program knows"),
        (lambda c: c.update(format="other"), "other"),
        (lambda c: c.pop("parts"), "lacks 'parts'"),
        (lambda c: c.update(parts=3), "cannot be used"),
        (lambda c: c["parts"][0].update(file="../features-00000.h5"), "inside the cache's folder"),
        (lambda c: c["parts"][0].update(file="features-00000.h5.partial"), "sealed part"),
        (lambda c: c["splits"]["train"].update(file="/tmp/text-train.h5"), "not a file name"),
        (lambda c: c["parts"][1].update(rows=4), "has 3 rows"),
        (lambda c: c["parts"].append({"file": "features-00009.h5", "rows": 3}), r"features-00009\.h5: .*missing"),
        (lambda c: c["spec"].update(width=6), r"features-00000\.h5: .*width: cache has 5, wanted 6"),
    ],
)
def test_manifest_that_does_not_fit(folder, change, words):
    edit_manifest(folder, change)
    with pytest.raises(CacheError, match=words):
        FeatureReader(folder)


def test_unknown_io(folder):
    with pytest.raises(CacheError, match="memmap or pread"):
        FeatureReader(folder, "mmap")


def test_text_of_a_split(folder):
    with FeatureReader(folder) as reader:
        table = reader.text("train")
        assert table.record(3) == {"question": "Wie groß ist Bild 3? 🐘"}
        with pytest.raises(CacheError, match="no split 'val'; there are: train"):
            reader.text("val")


def test_text_that_is_newer_than_the_manifest(folder):
    edit_manifest(folder, lambda c: c["splits"]["train"].update(questions=7))
    with FeatureReader(folder) as reader, pytest.raises(CacheError, match="does not belong"):
        reader.text("train")


def test_cache_stands_alone():
    script = (
        "import sys, cache.reader, cache.writer; "
        "print([m for m in ('torch', 'transformers', 'pipeline') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
