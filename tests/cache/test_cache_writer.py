import errno
import os
import shutil

import numpy as np
import pytest
from cache_fakes import (
    build,
    contents,
    digests,
    edit_manifest,
    features,
    flip,
    put,
    spec,
    stored_rows,
    table,
    texts_of,
    to_write,
    write_some,
)
from cache_kill import Kill, Killed, killed, undisturbed

from cache.audit import verify
from cache.estimate import estimate_write
from cache.format import inspect_part
from cache.part import PartWriter
from cache.reader import FeatureReader
from cache.reuse import sibling_caches
from cache.spec import CacheError
from cache.writer import FeatureWriter

WANTED = digests(8)  # with 3 rows a part: two full parts and one of 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "cache"
    build(folder, WANTED)
    return contents(folder)


# Kills


def test_kill_at_any_step_and_resume_gives_same_bytes(tmp_path):
    wanted = WANTED[:5]
    steps = undisturbed(lambda: build(tmp_path / "whole", wanted))
    assert steps > 40
    for step in range(1, steps + 1):
        folder = tmp_path / str(step)
        killed(step, lambda folder=folder: build(folder, wanted))
        undisturbed(lambda folder=folder: build(folder, wanted))
        assert contents(folder) == contents(tmp_path / "whole"), f"killed at step {step}"


def test_killed_second_finish_leaves_old_or_new_text(tmp_path):
    build(tmp_path / "old", WANTED)
    newest = {"skipped.jsonl": b"new"}

    def finish_again(folder):
        with FeatureWriter(folder, spec(), WANTED, 3) as writer:
            writer.finish({"train": table([7, 6, 5]), "val": table([1, 2])}, newest, {"model": "newer"})

    def seen(folder):
        with FeatureReader(folder) as reader:
            rows = {split: reader.text(split).image_row.tolist() for split in reader.splits}
            skipped = reader.attachment("skipped.jsonl").read_bytes()
            np.testing.assert_array_equal(reader.gather(range(8)), features(WANTED, spec()))
            return rows, skipped, reader.manifest.provenance["model"]

    old = seen(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    steps = undisturbed(lambda: finish_again(tmp_path / "new"))
    new = seen(tmp_path / "new")
    assert new == ({"train": [7, 6, 5], "val": [1, 2]}, b"new", "newer") != old
    found = []
    for step in range(1, steps + 1):
        folder = tmp_path / str(step)
        shutil.copytree(tmp_path / "old", folder)
        killed(step, lambda folder=folder: finish_again(folder))
        assert verify(folder).damage == []
        found.append(seen(folder))
        finish_again(folder)
        assert contents(folder) == contents(tmp_path / "new"), f"killed at step {step}"
    assert old in found
    assert new in found
    assert all(what in (old, new) for what in found)


@pytest.mark.parametrize("count", range(9))
def test_resume_writes_only_missing_rows(tmp_path, whole, count):
    with FeatureWriter(tmp_path, spec(), WANTED, part_rows=3) as writer:
        write_some(writer, limit=count)
    with FeatureWriter(tmp_path, spec(), WANTED, part_rows=3) as writer:
        assert (writer.reused, to_write(writer)) == (count, WANTED[count:])
    assert build(tmp_path, WANTED) == WANTED[count:]
    assert contents(tmp_path) == whole


# Several parts


@pytest.mark.parametrize("seed", range(5))
def test_parts_filled_in_any_order_give_same_bytes(tmp_path, whole, seed):
    rng = np.random.default_rng(seed)
    with FeatureWriter(tmp_path, spec(), WANTED, part_rows=3) as writer:
        parts = [PartWriter(path) for path in writer.parts]
        rows = [(part, row) for part in parts for row in range(part.layout.rows)]
        for number in rng.permutation(len(rows)).tolist():
            put(*rows[number])
        for number in rng.permutation(len(parts)).tolist():
            parts[number].seal()
        writer.finish(texts_of(writer, WANTED), {"skipped.jsonl": b'{"reason": "none"}\n'}, {"model": "fake"})
    assert contents(tmp_path) == whole


def test_resume_with_partly_filled_parts(tmp_path):
    wanted = digests(12)
    build(tmp_path / "whole", wanted)
    with FeatureWriter(tmp_path / "cache", spec(), wanted, part_rows=3) as writer:
        for path, row in zip([writer.parts[number] for number in (3, 0, 1)], (2, 0, 1), strict=True):
            with PartWriter(path) as part:
                put(part, row)
    written = [wanted[11], wanted[0], wanted[4]]
    assert build(tmp_path / "cache", wanted) == [digest for digest in wanted if digest not in written]
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_sealed_part_is_not_rewritten(tmp_path, whole):
    with FeatureWriter(tmp_path, spec(), WANTED, part_rows=3) as writer, PartWriter(writer.parts[1]) as part:
        put(part, 0, 1, 2)
        part.seal()
    assert build(tmp_path, WANTED) == WANTED[:3] + WANTED[6:]
    assert contents(tmp_path) == whole


def test_unwritten_batches_lie_on_fixed_grid(tmp_path):
    with FeatureWriter(tmp_path, spec(), WANTED) as writer, PartWriter(writer.parts[0]) as part:
        assert part.unwritten_batches(3) == [range(0, 3), range(3, 6), range(6, 8)]
        put(part, 1, 3, 4, 5)
        assert part.unwritten_batches(3) == [range(0, 3), range(6, 8)]
        assert part.unwritten_rows.tolist() == [0, 2, 6, 7]
        put(part, 0, 2, 6, 7)
        assert part.unwritten_batches(3) == []


# Wanted images


def test_extension_writes_only_new_images(tmp_path):
    build(tmp_path, WANTED)
    before = contents(tmp_path)
    more = digests(5, start=6)
    with FeatureWriter(tmp_path, spec(), more, part_rows=3) as writer:
        assert write_some(writer, limit=2) == more[2:4]
    with FeatureReader(tmp_path) as reader:  # not finished again: still the old cache
        assert set(dict(reader.stored())) == set(WANTED)
        assert len(reader.text("train")) == len(WANTED)
    assert build(tmp_path, more) == more[4:]
    assert all(contents(tmp_path)[name] == data for name, data in before.items() if name.startswith("features"))
    with FeatureReader(tmp_path) as reader:
        rows = dict(reader.stored())
        assert set(rows) == {*WANTED, *more}
        np.testing.assert_array_equal(reader.gather([rows[d] for d in more]), features(more, spec()))


def test_replaced_texts_and_attachments_are_removed(tmp_path):
    build(tmp_path, WANTED)
    with FeatureWriter(tmp_path, spec(), WANTED) as writer:
        writer.finish({"val": table([3])}, {"pictures.h5": b"1"})
    names = sorted(path.name.split("-")[0] for path in tmp_path.iterdir())
    assert names == [".lock", "features", "features", "features", "manifest.json", "pictures", "text"]
    with FeatureReader(tmp_path) as reader:
        assert (list(reader.splits), list(reader.manifest.attachments)) == (["val"], ["pictures.h5"])


def test_duplicates_are_stored_once(tmp_path):
    with FeatureWriter(tmp_path, spec(), [*WANTED, *WANTED[:3]], part_rows=3) as writer:
        assert to_write(writer) == WANTED


def test_cache_without_images(tmp_path):
    assert build(tmp_path, []) == []
    with FeatureReader(tmp_path) as reader:
        assert (reader.rows, list(reader.stored()), len(reader.text("train"))) == (0, [], 0)
        assert reader.gather([]).shape == (0, 2, 5)
    assert verify(tmp_path).damage == []


def test_unfinished_parts_keep_their_order(tmp_path):
    with FeatureWriter(tmp_path, spec(), WANTED, part_rows=4) as writer:
        write_some(writer, limit=2)
    extended = [*WANTED[::-1], *digests(1, start=20)]
    with FeatureWriter(tmp_path, spec(), extended, part_rows=4) as writer:
        assert to_write(writer) == [*WANTED[2:], *digests(1, start=20)]


def test_unwanted_rows_of_a_part_stay_unwritten(tmp_path):
    with FeatureWriter(tmp_path, spec(), WANTED[:4], part_rows=4) as writer:
        write_some(writer, limit=2)
    wanted = [WANTED[0], WANTED[2], WANTED[5]]  # without WANTED[3], for which the part waits
    assert build(tmp_path, wanted) == [WANTED[2], WANTED[5]]
    assert inspect_part(tmp_path / "features-00000.h5").crc32.tolist()[2:] == [-1, -1]
    with FeatureReader(tmp_path) as reader:
        assert dict(reader.stored()) == {WANTED[0]: 0, WANTED[1]: 1, WANTED[2]: 4, WANTED[5]: 5}
        assert reader.rows == 4
        np.testing.assert_array_equal(reader.gather([5, 0]), features([WANTED[5], WANTED[0]], spec()))
        with pytest.raises(CacheError, match=r"row 3 .*was never written"):
            reader.gather([0, 3])


def test_part_without_rows_is_removed(tmp_path):
    FeatureWriter(tmp_path, spec(), WANTED[:3]).close()
    assert (tmp_path / "features-00000.h5.partial").exists()
    build(tmp_path, WANTED[4:6])
    with FeatureReader(tmp_path) as reader:
        assert dict(reader.stored()) == {WANTED[4]: 0, WANTED[5]: 1}


def test_failed_images_are_unwritten_and_requested_again(tmp_path):
    bad = [WANTED[1], WANTED[3], WANTED[4], WANTED[5]]  # one of the first part, all of the second

    def one_run():
        with FeatureWriter(tmp_path, spec(), WANTED, part_rows=3) as writer:
            asked = to_write(writer)
            for path in writer.parts:
                with PartWriter(path) as part:
                    good = [row for row, digest in enumerate(part.digests) if digest.tobytes() not in bad]
                    put(part, *good)
                    part.mark_failed(part.unwritten_rows)
                    part.seal()
            writer.finish(texts_of(writer, WANTED))
        return asked

    assert one_run() == WANTED
    assert inspect_part(tmp_path / "features-00000.h5").crc32.tolist()[1] == -2
    first = contents(tmp_path)
    assert one_run() == bad  # still without features: nothing is added
    assert contents(tmp_path) == first
    with FeatureReader(tmp_path) as reader:
        good = [digest for digest in WANTED if digest not in bad]
        assert dict(reader.stored()) == dict(zip(good, (0, 2, 3, 4), strict=True))
        with pytest.raises(CacheError, match=r"row 1 .*was never written"):
            reader.gather([1])
    bad.clear()
    assert one_run() == [WANTED[1], WANTED[3], WANTED[4], WANTED[5]]
    assert stored_rows(tmp_path, spec()) == set(WANTED)


def test_failed_rows_stay_failed_after_resume(tmp_path):
    with FeatureWriter(tmp_path, spec(), WANTED[:3]) as writer, PartWriter(writer.parts[0]) as part:
        part.mark_failed(np.array([1]))
        put(part, 0)
    with PartWriter(tmp_path / "features-00000.h5.partial") as part:
        assert part.unwritten_rows.tolist() == [2]
        assert part.crc32.tolist()[1] == -2


# Rows of other caches


def test_rows_of_another_cache_are_copied(tmp_path):
    build(tmp_path / "first", digests(80), part_rows=7)
    wanted = [*digests(100)[::-1]]
    assert sorted(build(tmp_path / "second", wanted, part_rows=7, sources=[tmp_path / "first"])) == sorted(
        digests(20, start=80)
    )
    assert stored_rows(tmp_path / "second", spec()) == set(wanted)
    assert verify(tmp_path / "second").damage == []


def test_damaged_row_of_another_cache_is_not_copied(tmp_path):
    build(tmp_path / "first", WANTED)
    layout = inspect_part(tmp_path / "first" / "features-00001.h5")
    flip(layout.path, layout.features_offset + layout.spec.row_bytes)
    flip(tmp_path / "first" / "features-00002.h5", 9)  # nothing in it can be trusted
    with FeatureWriter(tmp_path / "second", spec(), WANTED, 3, [tmp_path / "first"]) as writer:
        assert writer.copied < len(WANTED)
        assert WANTED[4] in to_write(writer)
    build(tmp_path / "second", WANTED, sources=[tmp_path / "first"])
    assert stored_rows(tmp_path / "second", spec()) == set(WANTED)


def test_cache_of_another_spec_is_not_a_source(tmp_path):
    build(tmp_path / "first", WANTED, spec(encoder_fingerprint="cd" * 32))
    build(tmp_path / "unfinished", WANTED)
    (tmp_path / "unfinished" / "manifest.json").unlink()
    sources = [tmp_path / "first", tmp_path / "unfinished", tmp_path / "absent"]
    with FeatureWriter(tmp_path / "second", spec(), WANTED, 3, sources) as writer:
        assert (writer.copied, to_write(writer)) == (0, WANTED)


def test_kill_at_any_step_of_copying_and_resume_gives_same_bytes(tmp_path):
    build(tmp_path / "first", WANTED[:2])
    sources = [tmp_path / "first"]
    steps = undisturbed(lambda: build(tmp_path / "whole", WANTED[:3], sources=sources))
    for step in range(1, steps + 1):
        folder = tmp_path / str(step)
        killed(step, lambda folder=folder: build(folder, WANTED[:3], sources=sources))
        build(folder, WANTED[:3], sources=sources)
        assert contents(folder) == contents(tmp_path / "whole"), f"killed at step {step}"


def test_sibling_caches_are_finished_and_of_equal_spec(tmp_path, monkeypatch):
    build(tmp_path / "equal", WANTED[:1])
    build(tmp_path / "also", WANTED[1:2])
    build(tmp_path / "other", WANTED[:1], spec("float32"))
    build(tmp_path / "damaged", WANTED[:1])
    flip(tmp_path / "damaged" / "manifest.json", 50)
    FeatureWriter(tmp_path / "unfinished", spec(), WANTED).close()
    (tmp_path / "pictures").mkdir()
    assert sibling_caches(tmp_path / "new", spec()) == [tmp_path / "also", tmp_path / "equal"]
    assert sibling_caches(tmp_path / "equal", spec()) == [tmp_path / "also"]
    monkeypatch.chdir(tmp_path / "pictures")
    assert sibling_caches((tmp_path / "equal").relative_to(tmp_path), spec()) == []


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


def test_estimate_write_counts_images_and_changes_nothing(tmp_path):
    build(tmp_path / "near", digests(3, start=8))
    with FeatureWriter(tmp_path / "cache", spec(), WANTED, part_rows=3) as writer:
        write_some(writer, limit=4)
    wanted = [*digests(12), *WANTED]
    before = snapshot(tmp_path)
    found = estimate_write(tmp_path / "cache", spec(), wanted, [tmp_path / "near"])
    assert (found.wanted, found.stored, found.copyable, found.to_encode) == (12, 4, 3, 5)
    fresh = estimate_write(tmp_path / "new", spec(), wanted, [tmp_path / "near"])
    assert (fresh.wanted, fresh.stored, fresh.copyable, fresh.to_encode) == (12, 0, 3, 9)
    with pytest.raises(CacheError, match="another spec"):
        estimate_write(tmp_path / "cache", spec("float32"), wanted)
    assert snapshot(tmp_path) == before


def test_estimate_write_bounds_disk_usage(tmp_path):
    kind, wanted = spec(query_tokens=32, width=16), digests(2048)
    for part_rows in (1, 100, 1024):
        folder = tmp_path / str(part_rows)
        bound = estimate_write(folder, kind, wanted[: 8 * part_rows], part_rows=part_rows).bytes_needed
        FeatureWriter(folder, kind, wanted[: 8 * part_rows], part_rows).close()
        taken = sum(path.stat().st_size for path in folder.glob("features-*"))
        assert taken <= bound <= 1.05 * taken


# Rejected input


def test_other_spec_is_rejected_with_differences(tmp_path):
    build(tmp_path, WANTED)
    before = contents(tmp_path)
    with pytest.raises(CacheError, match="dtype: cache has float16, wanted float32") as caught:
        FeatureWriter(tmp_path, spec("float32"), WANTED)
    assert "cache.dir" in str(caught.value)
    assert f"`pipe cache rm {tmp_path}`" in str(caught.value)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(CacheError, match=r"features-00000\.h5.*another spec"):
        FeatureWriter(tmp_path, spec("float32"), WANTED)
    del before["manifest.json"]
    assert contents(tmp_path) == before


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_nonfinite_features_are_rejected(tmp_path, dtype, value):
    kind = spec(dtype)
    values = features(WANTED[:2], kind)
    values[1, 0, 3] = np.array(value, "<f4").view("<u4") >> 16 if dtype == "bfloat16" else value
    with FeatureWriter(tmp_path, kind, WANTED) as writer:
        with PartWriter(writer.parts[0]) as part, pytest.raises(CacheError, match=WANTED[1].hex()):
            part.write(np.array([0, 1]), values)
        assert to_write(writer) == WANTED


def test_largest_finite_numbers_are_stored(tmp_path):
    for dtype, largest in (("float16", 65504), ("float32", np.finfo(np.float32).max), ("bfloat16", 0xFF7F)):
        kind = spec(dtype)
        values = np.full_like(features(WANTED[:1], kind), largest)
        with FeatureWriter(tmp_path / dtype, kind, WANTED[:1]) as writer, PartWriter(writer.parts[0]) as part:
            part.write(np.array([0]), values)
            part.seal()
            writer.finish({})
        with FeatureReader(tmp_path / dtype) as reader:
            np.testing.assert_array_equal(reader.gather([0]), values)


def test_features_of_wrong_shape_or_type_are_rejected(tmp_path):
    with FeatureWriter(tmp_path, spec(), WANTED) as writer, PartWriter(writer.parts[0]) as part:
        with pytest.raises(CacheError, match="float32"):
            part.write(np.array([0, 1]), features(WANTED[:2], spec("float32")))
        with pytest.raises(CacheError, match=r"\(3, 2, 5\)"):
            part.write(np.array([0, 1]), features(WANTED[:3], spec()))
        put(part, 0)
        with pytest.raises(AssertionError, match="once"):
            put(part, 0)


def test_finish_requires_all_parts_and_valid_text(tmp_path):
    with FeatureWriter(tmp_path, spec(), WANTED) as writer:
        with pytest.raises(CacheError, match="a part is unfinished"):
            writer.finish({})
        with PartWriter(writer.parts[0]) as part:
            put(part, *range(7))
            part.mark_failed(part.unwritten_rows)
            part.seal()
        for row in (7, 8):
            with pytest.raises(CacheError, match="image_row"):
                writer.finish({"train": table([0, row])})
        with pytest.raises(CacheError, match=r"\.\./x"):
            writer.finish({"../x": table([0])})
        with pytest.raises(CacheError, match=r"\.\./x"):
            writer.finish({}, {"../x.jsonl": b""})
    assert not (tmp_path / "manifest.json").exists()
    assert [path.name for path in tmp_path.parent.glob("x*")] == []


@pytest.mark.parametrize("name", ["thesis.txt", "train.jsonl", "text-mine.h5", "annotations.h5"])
def test_folder_with_other_files_is_rejected(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(CacheError, match=name):
        FeatureWriter(tmp_path, spec(), WANTED)
    with pytest.raises(CacheError, match="not a folder"):
        FeatureWriter(tmp_path / name, spec(), WANTED)
    assert contents(tmp_path) == {name: b"mine"}


def test_other_files_in_a_cache_are_kept(tmp_path):
    build(tmp_path, WANTED[:3])
    for name in ("notes.txt", "train.jsonl", "notes.txt.tmp"):
        (tmp_path / name).write_text("mine")
    build(tmp_path, WANTED)
    assert {name for name, data in contents(tmp_path).items() if data == b"mine"} == {
        "notes.txt",
        "train.jsonl",
        "notes.txt.tmp",
    }


def test_invalid_digest_and_part_rows_are_rejected(tmp_path):
    with pytest.raises(CacheError, match="32 bytes"):
        FeatureWriter(tmp_path / "cache", spec(), [b"abc"])
    with pytest.raises(CacheError, match="at least 1 row, not 0"):
        FeatureWriter(tmp_path / "cache", spec(), WANTED, part_rows=0)
    assert not (tmp_path / "cache").exists()


def test_deleted_part_is_rewritten_under_another_name(tmp_path):
    build(tmp_path, WANTED)
    (tmp_path / "features-00002.h5").unlink()
    assert build(tmp_path, WANTED) == WANTED[6:]
    assert (tmp_path / "features-00003.h5").exists()
    with FeatureReader(tmp_path) as reader:
        np.testing.assert_array_equal(reader.gather(reader.text("train").image_row), features(WANTED, spec()))


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_damaged_manifest_or_plan_is_rejected_and_can_be_deleted(tmp_path, name):
    build(tmp_path, WANTED[:5])
    with FeatureWriter(tmp_path, spec(), WANTED, 3) as writer:
        write_some(writer, limit=1)
    flip(tmp_path / name, 60)
    with pytest.raises(CacheError, match=rf"{name}: cannot be used.*Delete this one file and run `pipe precompute`"):
        FeatureWriter(tmp_path, spec(), WANTED, 3)
    (tmp_path / name).unlink()
    assert build(tmp_path, WANTED) == WANTED[6:]
    assert stored_rows(tmp_path, spec()) == set(WANTED)


def test_unfinished_part_with_damaged_head_is_rejected(tmp_path):
    FeatureWriter(tmp_path, spec(), WANTED, 3).close()
    layout = inspect_part(tmp_path / "features-00001.h5.partial")
    for byte in (5, layout.crc_offset - 1, layout.features_offset - 1):
        flip(layout.path, byte)
        with pytest.raises(CacheError, match=r"features-00001\.h5\.partial: its head .*Delete the file"):
            FeatureWriter(tmp_path, spec(), WANTED, 3)
        flip(layout.path, byte)
    layout.path.unlink()
    assert build(tmp_path, WANTED) == WANTED


# The disk


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_write_to_full_disk_raises_and_can_be_resumed(tmp_path, whole, monkeypatch):
    with FeatureWriter(tmp_path, spec(), WANTED, part_rows=3) as writer:
        write_some(writer, limit=2)
        monkeypatch.setattr(os, "pwrite", no_space)
        with pytest.raises(CacheError, match=r"features-00000.*No space left.*(R|r)un the same command again"):
            write_some(writer)
    monkeypatch.undo()
    assert build(tmp_path, WANTED) == WANTED[2:]
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("call", ["pwrite", "replace", "fsync"])
def test_full_disk_at_start_and_at_finish(tmp_path, monkeypatch, call):
    with monkeypatch.context() as patch:
        patch.setattr(os, call, no_space)
        with pytest.raises(CacheError, match=r"No space left.*(R|r)un the same command again"):
            FeatureWriter(tmp_path, spec(), WANTED)
    with FeatureWriter(tmp_path, spec(), WANTED) as writer:
        write_some(writer)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, no_space)
            with pytest.raises(CacheError, match=r"No space left.*(R|r)un the same command again"):
                writer.finish({"train": table([0])})
        writer.finish({"train": table([0])})
    assert stored_rows(tmp_path, spec()) == set(WANTED)


class Disk:
    """Record of the writes to one part and its flushes."""

    def __init__(self, monkeypatch, layout):
        self.layout, self.log = layout, []
        """(what, offset, data), where what is "row", "crc" or "flush"."""
        for name in ("pwrite", "fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self._recorded(name, getattr(os, name)))

    def _recorded(self, name, call):
        def recorded(*args):
            if name == "pwrite":
                what = "row" if args[2] >= self.layout.features_offset else "crc"
                self.log.append((what, args[2], bytes(args[1])))
            else:
                self.log.append(("flush", None, None))
            return call(*args)

        return recorded

    @property
    def order(self):
        return [what for what, _, _ in self.log]


@pytest.mark.parametrize(
    ("seconds", "size", "order"),
    [
        (1e9, 1 << 30, "row row row row flush crc crc crc crc"),  # committed when it is closed
        (0, 1 << 30, "row flush crc row flush crc row flush crc row flush crc"),
        (1e9, 40, "row row flush crc crc row row flush crc crc"),  # a row has 20 bytes
    ],
)
def test_checksums_are_written_after_rows_are_flushed(tmp_path, monkeypatch, seconds, size, order):
    monkeypatch.setattr("cache.part.COMMIT_SECONDS", seconds)
    monkeypatch.setattr("cache.part.COMMIT_BYTES", size)
    with FeatureWriter(tmp_path, spec(), WANTED) as writer, PartWriter(writer.parts[0]) as part:
        disk = Disk(monkeypatch, part.layout)
        for row in (0, 3, 1, 2):
            put(part, row)
        written = inspect_part(part.path).crc32 >= 0
        assert written.sum() == disk.order.count("crc")
        part.close()
        assert " ".join(disk.order) == order
        assert (inspect_part(part.path).crc32 >= 0).sum() == 4


@pytest.mark.parametrize("size", [1, 40, 50, 1 << 30])
def test_power_loss_leaves_no_checksum_without_its_row(tmp_path, monkeypatch, size):
    monkeypatch.setattr("cache.part.COMMIT_BYTES", size)
    with FeatureWriter(tmp_path, spec(), WANTED) as writer:
        empty = writer.parts[0].read_bytes()
        with PartWriter(writer.parts[0]) as part:
            disk = Disk(monkeypatch, part.layout)
            for rows in ([0, 1], [5], [2, 7], [3, 4, 6]):
                put(part, *rows)
            part.seal()
    with_checksum = 0
    for cut in range(len(disk.log) + 1):
        flushed = max((n + 1 for n in range(cut) if disk.log[n][0] == "flush"), default=0)
        state = bytearray(empty)
        for number, (what, offset, data) in enumerate(disk.log[:cut]):
            if what == "crc" or (what == "row" and number < flushed):  # the worst that a disk may do
                state[offset : offset + len(data)] = data
        path = tmp_path / "cut.h5"
        path.write_bytes(state)
        left = inspect_part(path)
        for row in np.flatnonzero(left.crc32 >= 0).tolist():
            start = left.features_offset + row * left.spec.row_bytes
            assert state[start : start + left.spec.row_bytes] == features(WANTED[row : row + 1], spec()).tobytes()
            with_checksum += 1
    assert with_checksum


def broken(*_):
    raise OSError(errno.EIO, "Input/output error")


def test_rows_of_a_failed_flush_get_no_checksum(tmp_path, monkeypatch):
    with FeatureWriter(tmp_path, spec(), WANTED) as writer, PartWriter(writer.parts[0]) as part:
        put(part, 0)
        part.commit()
        put(part, 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", broken)
            with pytest.raises(CacheError, match="Input/output error"):
                part.commit()
    with FeatureWriter(tmp_path, spec(), WANTED) as writer:
        assert to_write(writer) == WANTED[1:]


def test_temporary_files_are_removed(tmp_path, whole):
    with FeatureWriter(tmp_path, spec(), WANTED, 3) as writer:
        write_some(writer, limit=4)
    for name in ("features-00003.h5.partial.tmp", "text-train.h5.tmp", "manifest.json.tmp", "plan.json.tmp"):
        (tmp_path / name).write_bytes(b"half of")
    build(tmp_path, WANTED)
    assert contents(tmp_path) == whole


def test_simulated_kill_stops_all_changes(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        Kill(patch, at=1)
        for _ in range(2):
            with pytest.raises(Killed):
                tmp_path.unlink()


def test_too_many_open_files_is_not_a_damaged_source(tmp_path, monkeypatch):
    build(tmp_path / "a", WANTED)
    error = OSError(24, "Too many open files")
    monkeypatch.setattr("cache.part_reader.map_file", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(CacheError, match="Too many open files"):
        FeatureWriter(tmp_path / "b", spec(), WANTED, sources=[tmp_path / "a"])


def test_source_is_read_with_requested_io(tmp_path, monkeypatch):
    build(tmp_path / "a", WANTED)
    monkeypatch.setattr("cache.part_reader.map_file", lambda *_: pytest.fail("mapped"))
    with FeatureWriter(tmp_path / "b", spec(), WANTED, sources=[tmp_path / "a"], io="pread") as writer:
        assert writer.copied == len(WANTED)


def test_sealed_part_is_inspected_once(tmp_path, monkeypatch):
    build(tmp_path, WANTED, part_rows=1)
    opened = []
    monkeypatch.setattr("cache.parts.inspect_part", lambda path: opened.append(path.name) or inspect_part(path))
    build(tmp_path, WANTED, part_rows=1)
    assert len(opened) == len(set(opened)) == len(WANTED)


def test_link_in_place_of_part_is_rejected(tmp_path):
    build(tmp_path / "cache", WANTED)
    part = tmp_path / "cache" / "features-00001.h5"
    part.rename(tmp_path / "elsewhere.h5")
    part.symlink_to(tmp_path / "elsewhere.h5")
    with pytest.raises(CacheError, match=r"features-00001\.h5: is a link"):
        FeatureWriter(tmp_path / "cache", spec(), WANTED)
    with pytest.raises(CacheError, match=r"features-00001\.h5: is a link"):
        FeatureReader(tmp_path / "cache").gather([4])
    assert [damage.file for damage in verify(tmp_path / "cache").damage] == ["features-00001.h5"]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["attachments"].update({"skipped.jsonl": "/../../x"}),
        lambda content: content["parts"][0].update(head_sha256="x"),
        lambda content: content["splits"]["train"].update(sha256="ab" * 31),
    ],
)
def test_invalid_digest_in_manifest_is_rejected(tmp_path, change):
    build(tmp_path, WANTED)
    edit_manifest(tmp_path, change)
    with pytest.raises(CacheError, match="is not a SHA-256"):
        FeatureReader(tmp_path)
