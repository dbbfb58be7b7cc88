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
    flip(path, layout.features_offset + layout.spec.row_bytes + 7, bit=2)
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
        reader.gather([1])
        path = folder / "features-00000.h5"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(CacheError, match=r"features-00000\.h5: cannot be read"):
            reader.gather([0])


def test_part_that_is_missing_or_cut_is_found_when_the_cache_is_opened(folder):
    path = folder / "features-00001.h5"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(CacheError, match=rf"features-00001\.h5: has {len(data) - 1} bytes, must have {len(data)}"):
        FeatureReader(folder)
    path.unlink()
    with pytest.raises(CacheError, match=r"features-00001\.h5: is missing"):
        FeatureReader(folder)


def test_every_part_is_checked_before_it_is_opened_and_only_when_it_is_needed(folder):
    flip(folder / "features-00001.h5", 100)
    with FeatureReader(folder) as reader:
        reader.gather([0, 7])
        with pytest.raises(CacheError, match=r"features-00001\.h5: its head of \d+ bytes is not what was written"):
            reader.gather([3])


@pytest.mark.parametrize("io", ["memmap", "pread"])
def test_gather_fills_the_memory_that_it_is_given(folder, io):
    with FeatureReader(folder, io) as reader:
        out = np.empty((3, *features(WANTED[:1], spec()).shape[1:]), np.float16)
        assert reader.gather([6, 0, 6], out=out) is out
        np.testing.assert_array_equal(out, features([WANTED[6], WANTED[0], WANTED[6]], spec()))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
def test_rows_may_be_whole_numbers_of_any_type(folder, dtype):
    with FeatureReader(folder) as reader:
        np.testing.assert_array_equal(reader.gather(np.array([7, 2], dtype)), features([WANTED[7], WANTED[2]], spec()))


@pytest.mark.parametrize("io", ["memmap", "pread"])
def test_a_closed_reader_opens_and_checks_again(folder, io):
    reader = FeatureReader(folder, io)
    for _ in range(2):
        np.testing.assert_array_equal(reader.gather([3]), features(WANTED[3:4], spec()))
        reader.close()
    flip(folder / "features-00001.h5", inspect_part(folder / "features-00001.h5").features_offset)
    with pytest.raises(CacheError, match="row 0 "):
        reader.gather([3])


@pytest.mark.parametrize("io", ["memmap", "pread"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (32, 64), (5, 4096)])
def test_rows_of_any_length_out_of_parts_opened_in_any_order(tmp_path, io, shape):
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
def test_threads_may_share_a_reader(tmp_path, io):
    wanted = digests(60)
    build(tmp_path, wanted, part_rows=2)
    expected = features(wanted, spec())
    orders = [np.random.default_rng(seed).permutation(60).reshape(-1, 4) for seed in range(8)]
    for _ in range(5):
        with FeatureReader(tmp_path, io) as reader, ThreadPoolExecutor(8) as pool:
            found = [*pool.map(lambda order, reader=reader: [reader.gather(rows) for rows in order], orders)]
        for order, batches in zip(orders, found, strict=True):
            np.testing.assert_array_equal(np.concatenate(batches), expected[order.reshape(-1)])


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
        (lambda c: c["splits"].update(val=c["splits"]["train"]), "text of split 'val'"),
        (lambda c: c["attachments"].update({"../x.jsonl": "ab" * 32}), "not a name that an attachment may have"),
        (lambda c: c["parts"][1].update(rows=0), r"rows is 0, must be a whole number from 1"),
        (lambda c: c["parts"][1].update(rows=4), r"features-00001\.h5: has \d+ bytes, must have"),
        (lambda c: c["parts"][1].update(more=1), "cannot be used"),
        (lambda c: c["parts"].append(c["parts"][0] | {"file": "features-00009.h5"}), r"features-00009\.h5: .*missing"),
        (lambda c: c["spec"].update(width=6), r"features-00000\.h5: has"),
        (lambda c: c["spec"].update(encoder_dtype="float16"), "encoder_dtype: cache has float32, wanted float16"),
        (lambda c: c["parts"][0].update(head_sha256="ab" * 32), "its head of"),
        (lambda c: c["parts"][0].update(head_bytes=1, rows=1), r"features-00000\.h5: has"),
    ],
)
def test_manifest_that_does_not_fit(folder, change, words):
    edit_manifest(folder, change)
    with pytest.raises(CacheError, match=words), FeatureReader(folder) as reader:
        reader.gather([0])


def test_manifest_that_was_changed_by_hand(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"part_rows": 3', '"part_rows": 4'))
    with pytest.raises(CacheError, match=r"manifest\.json: .*SHA-256 at its end does not fit.*delete this one file"):
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["splits"]["train"].update(questions=7), "does not belong"),
        (lambda c: (c["parts"].pop(), c.update(rows=6)), "does not belong"),  # questions on rows that are not there
        (lambda c: c["splits"]["train"].update(sha256="ab" * 32), "is not what was written"),
        (lambda c: c["splits"]["train"].update(file="text-train-000000000000.h5"), "is missing"),
    ],
)
def test_text_that_does_not_belong_to_the_manifest(folder, change, words):
    edit_manifest(folder, change)
    with FeatureReader(folder) as reader, pytest.raises(CacheError, match=f"{words}.*precompute"):
        reader.text("train")


def test_attachments_come_back_checked(folder):
    with FeatureReader(folder) as reader:
        path = reader.attachment("left-out.jsonl")
        assert path.read_bytes() == b'{"reason": "none"}\n'
        with pytest.raises(CacheError, match=r"no attachment 'pictures\.h5'; there are: left-out\.jsonl"):
            reader.attachment("pictures.h5")
        flip(path, 3)
        with pytest.raises(CacheError, match="is not what was written"):
            reader.attachment("left-out.jsonl")


def test_cache_stands_alone():
    script = (
        "import sys, cache.reader, cache.writer; "
        "print([m for m in ('torch', 'transformers', 'pipeline') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


MANY = """
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
def test_more_parts_than_a_process_may_have_files(tmp_path, io):
    build(tmp_path, digests(100), part_rows=1)
    env = os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}
    script = (
        MANY
        if io == "memmap"
        else MANY.replace("with Feat", "import cache.reader; cache.reader.MAX_OPEN_FILES = 9\nwith Feat")
    )
    subprocess.run([sys.executable, "-c", script, tmp_path, io], env=env, check=True)


def test_a_map_is_let_go_with_its_reader(folder):
    def maps():
        return Path("/proc/self/maps").read_text().count(str(folder))

    reader = FeatureReader(folder)
    reader.gather([0, 7])
    assert maps() == 2
    reader.close()
    assert maps() == 0
