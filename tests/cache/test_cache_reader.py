import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cache_fakes import build, digests, edit_manifest, features, flip, spec, write_some

from cache.format import inspect_part
from cache.reader import FeatureReader
from cache.spec import CacheError
from cache.writer import FeatureWriter

WANTED = digests(8)
HERE = Path(__file__).parent
ORDERS = [[0, 1, 2, 3, 4, 5, 6, 7], [7, 0, 3, 3, 5], [2, 0, 1], [], [4]]


@pytest.fixture
def folder(tmp_path):
    build(tmp_path / "cache", WANTED)
    return tmp_path / "cache"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("io", ["memmap", "pread"])
def test_round_trip(tmp_path, dtype, io):
    build(tmp_path, WANTED, spec(dtype))
    with FeatureReader(tmp_path, io) as reader:
        assert (reader.spec, reader.rows, reader.splits) == (spec(dtype), 8, {"train": 8})
        assert reader.manifest.provenance == {"model": "fake"}
        assert dict(reader.stored()) == {digest: row for row, digest in enumerate(WANTED)}
        for order in ORDERS:
            found = reader.gather(np.asarray(order, np.int64))
            assert found.dtype == spec(dtype).storage_dtype
            np.testing.assert_array_equal(found, features([WANTED[i] for i in order], spec(dtype)))


@pytest.mark.parametrize("io", ["memmap", "pread"])
def test_open_reader_can_be_pickled(folder, io):
    with FeatureReader(folder, io) as reader:
        reader.gather([0, 7])
        state = pickle.dumps(reader)
        assert len(state) < 20_000
        with pickle.loads(state) as copy:
            np.testing.assert_array_equal(copy.gather([7]), features(WANTED[7:], spec()))
        np.testing.assert_array_equal(reader.gather([7]), features(WANTED[7:], spec()))


@pytest.mark.parametrize("io", ["memmap", "pread"])
def test_flipped_bit_raises_at_first_read(folder, io):
    path = folder / "features-00001.h5"
    layout = inspect_part(path)
    flip(path, layout.features_offset + layout.spec.row_bytes + 7, bit=2)
    with FeatureReader(folder, io) as reader:
        reader.gather([0, 1, 2, 3, 5, 6, 7])
        for _ in range(2):
            with pytest.raises(CacheError, match=r"features-00001\.h5: row 1 \(row 4 of the cache\).*precompute"):
                reader.gather([3, 4])


@pytest.mark.parametrize("row", [-1, 8])
def test_row_out_of_range_raises(folder, row):
    with (
        FeatureReader(folder) as reader,
        pytest.raises(CacheError, match=f"row {row} is out of range"),
    ):
        reader.gather([0, row])


def test_file_truncated_during_pread_raises(folder):
    with FeatureReader(folder, "pread") as reader:
        reader.gather([1])
        path = folder / "features-00000.h5"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(CacheError, match=r"features-00000\.h5: cannot be read"):
            reader.gather([0])


def test_missing_or_truncated_part_raises_at_open(folder):
    path = folder / "features-00001.h5"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(CacheError, match=rf"features-00001\.h5: has {len(data) - 1} bytes, must have {len(data)}"):
        FeatureReader(folder)
    path.unlink()
    with pytest.raises(CacheError, match=r"features-00001\.h5: is missing"):
        FeatureReader(folder)


def test_part_head_is_checked_at_first_use(folder):
    flip(folder / "features-00001.h5", 100)
    with FeatureReader(folder) as reader:
        reader.gather([0, 7])
        with pytest.raises(CacheError, match=r"features-00001\.h5: its head of \d+ bytes is damaged"):
            reader.gather([3])


@pytest.mark.parametrize("io", ["memmap", "pread"])
def test_gather_fills_out(folder, io):
    with FeatureReader(folder, io) as reader:
        out = np.empty((3, *features(WANTED[:1], spec()).shape[1:]), np.float16)
        assert reader.gather([6, 0, 6], out=out) is out
        np.testing.assert_array_equal(out, features([WANTED[6], WANTED[0], WANTED[6]], spec()))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
def test_gather_accepts_any_integer_dtype(folder, dtype):
    with FeatureReader(folder) as reader:
        np.testing.assert_array_equal(reader.gather(np.array([7, 2], dtype)), features([WANTED[7], WANTED[2]], spec()))


@pytest.mark.parametrize("io", ["memmap", "pread"])
def test_closed_reader_reopens_and_checks_again(folder, io):
    reader = FeatureReader(folder, io)
    for _ in range(2):
        np.testing.assert_array_equal(reader.gather([3]), features(WANTED[3:4], spec()))
        reader.close()
    flip(folder / "features-00001.h5", inspect_part(folder / "features-00001.h5").features_offset)
    with pytest.raises(CacheError, match="row 0 "):
        reader.gather([3])


@pytest.mark.parametrize("io", ["memmap", "pread"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (32, 64), (5, 4096)])
def test_gather_any_row_size_and_part_order(tmp_path, io, shape):
    kind = spec(query_tokens=shape[0], width=shape[1])
    wanted = digests(23)
    build(tmp_path, wanted, kind, part_rows=4)
    rng = np.random.default_rng(0)
    for _ in range(5):
        with FeatureReader(tmp_path, io) as reader:
            for size in (1, 2, 3, 50):
                rows = rng.integers(23, size=size)
                np.testing.assert_array_equal(reader.gather(rows), features([wanted[row] for row in rows], kind))


@pytest.mark.parametrize("io", ["memmap", "pread"])
def test_threads_can_share_a_reader(tmp_path, io):
    wanted = digests(60)
    build(tmp_path, wanted, part_rows=2)
    expected = features(wanted, spec())
    orders = [np.random.default_rng(seed).permutation(60).reshape(-1, 4) for seed in range(8)]
    for _ in range(5):
        with FeatureReader(tmp_path, io) as reader, ThreadPoolExecutor(8) as pool:
            found = [*pool.map(lambda order, reader=reader: [reader.gather(rows) for rows in order], orders)]
        for order, batches in zip(orders, found, strict=True):
            np.testing.assert_array_equal(np.concatenate(batches), expected[order.reshape(-1)])


def test_missing_or_unfinished_cache_raises(tmp_path):
    with pytest.raises(CacheError, match=r"no cache at .*absent. Run `pipe precompute` first"):
        FeatureReader(tmp_path / "absent")
    with FeatureWriter(tmp_path, spec(), WANTED) as writer:
        write_some(writer, limit=3)
    with pytest.raises(CacheError, match=r"unfinished.*to resume"):
        FeatureReader(tmp_path)


def test_manifest_that_is_not_json_raises(folder):
    (folder / "manifest.json").write_text("{")
    with pytest.raises(CacheError, match=r"manifest\.json: cannot be used"):
        FeatureReader(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(format_version=2), "version 2, only"),
        (lambda c: c.update(format="other"), "other"),
        (lambda c: c.pop("parts"), "lacks 'parts'"),
        (lambda c: c.update(parts=3), "cannot be used"),
        (lambda c: c["parts"][0].update(file="../features-00000.h5"), "inside the cache's folder"),
        (lambda c: c["parts"][0].update(file="features-00000.h5.partial"), "sealed part"),
        (lambda c: c["splits"]["train"].update(file="/tmp/text-train.h5"), "not an allowed file name"),
        (lambda c: c["splits"].update(val=c["splits"]["train"]), "text of split 'val'"),
        (lambda c: c["attachments"].update({"../x.jsonl": "ab" * 32}), "not allowed as the name of an attachment"),
        (lambda c: c["parts"][1].update(rows=0), r"rows is 0, must be an integer from 1"),
        (lambda c: c["parts"][1].update(rows=4), r"features-00001\.h5: has \d+ bytes, must have"),
        (lambda c: c["parts"][1].update(more=1), "cannot be used"),
        (lambda c: c["parts"].append(c["parts"][0] | {"file": "features-00009.h5"}), r"features-00009\.h5: .*missing"),
        (lambda c: c["spec"].update(width=6), r"features-00000\.h5: has"),
        (lambda c: c["spec"].update(encoder_dtype="float16"), "encoder_dtype: cache has float32, wanted float16"),
        (lambda c: c["parts"][0].update(head_sha256="ab" * 32), "its head of"),
        (lambda c: c["parts"][0].update(head_bytes=1, rows=1), r"features-00000\.h5: has"),
    ],
)
def test_inconsistent_manifest_raises(folder, change, words):
    edit_manifest(folder, change)
    with pytest.raises(CacheError, match=words), FeatureReader(folder) as reader:
        reader.gather([0])


def test_edited_manifest_raises(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"part_rows": 3', '"part_rows": 4'))
    with pytest.raises(CacheError, match=r"manifest\.json: .*SHA-256 at its end does not match.*Delete this one file"):
        FeatureReader(folder)


def test_unknown_io_raises(folder):
    with pytest.raises(CacheError, match="memmap or pread"):
        FeatureReader(folder, "mmap")


def test_text_returns_a_split(folder):
    with FeatureReader(folder) as reader:
        table = reader.text("train")
        assert table.record(3) == {"question": "Wie groß ist Bild 3? 🐘"}
        with pytest.raises(CacheError, match="no split 'val'; there are: train"):
            reader.text("val")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["splits"]["train"].update(questions=7), "does not match"),
        (lambda c: (c["parts"].pop(), c.update(rows=6)), "does not match"),  # questions on rows that are not there
        (lambda c: c["splits"]["train"].update(sha256="ab" * 32), "is damaged"),
        (lambda c: c["splits"]["train"].update(file="text-train-000000000000.h5"), "is missing"),
    ],
)
def test_text_that_does_not_match_manifest_raises(folder, change, words):
    edit_manifest(folder, change)
    with FeatureReader(folder) as reader, pytest.raises(CacheError, match=f"{words}.*precompute"):
        reader.text("train")


def test_attachment_is_checked(folder):
    with FeatureReader(folder) as reader:
        path = reader.attachment("skipped.jsonl")
        assert path.read_bytes() == b'{"reason": "none"}\n'
        with pytest.raises(CacheError, match=r"no attachment 'pictures\.h5'; there are: skipped\.jsonl"):
            reader.attachment("pictures.h5")
        flip(path, 3)
        with pytest.raises(CacheError, match="is damaged"):
            reader.attachment("skipped.jsonl")


def test_cache_imports_no_model_library():
    script = (
        "import sys, cache.reader, cache.writer; "
        "print([m for m in ('torch', 'transformers', 'pipeline') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


MANY_PARTS = """
import resource, sys
import numpy as np
from cache_fakes import *
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
with FeatureReader(Path(sys.argv[1]), sys.argv[2]) as reader:
    rows = dict(reader.stored())
    for _ in range(2):
        np.testing.assert_array_equal(reader.gather([*rows.values()]), features(rows, spec()))
"""


@pytest.mark.parametrize("io", ["memmap", "pread"])
def test_gather_from_more_parts_than_open_files_allowed(tmp_path, io):
    build(tmp_path, digests(100), part_rows=1)
    env = os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}
    subprocess.run([sys.executable, "-c", MANY_PARTS, tmp_path, io], env=env, check=True)


def test_parts_beyond_the_limit_of_maps_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("cache.part_reader.MAX_MAPPED_PARTS", 2)
    build(tmp_path, WANTED, part_rows=1)
    with FeatureReader(tmp_path) as first, FeatureReader(tmp_path) as second:
        for reader in (first, second):
            for _ in range(2):
                np.testing.assert_array_equal(
                    reader.gather([7, 0, 5, 3]), features([WANTED[i] for i in (7, 0, 5, 3)], spec())
                )
        assert open_maps(tmp_path) == 2  # of both readers
        first.close()
        second.gather([1])
        assert open_maps(tmp_path) == 1  # maps of a closed reader count no more


def open_maps(folder):
    return Path("/proc/self/maps").read_text().count(str(folder))


def test_close_unmaps_parts(folder):
    reader = FeatureReader(folder)
    reader.gather([0, 7])
    assert open_maps(folder) == 2
    reader.close()
    assert open_maps(folder) == 0
