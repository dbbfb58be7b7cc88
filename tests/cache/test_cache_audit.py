import os
import random
import shutil

import numpy as np
import pytest
from cache_fakes import (
    build,
    contents,
    digests,
    features,
    flip,
    put,
    spec,
    stored_rows,
    table,
    texts_of,
    to_write,
)
from cache_kill import killed, undisturbed

import cache.audit
from cache.audit import NOT_A_PART, NOT_STORED, Damage, verify
from cache.format import inspect_part
from cache.inventory import describe
from cache.part import PartWriter
from cache.reader import FeatureReader
from cache.repair import drop_damaged
from cache.spec import CacheError, UnreadableError
from cache.writer import FeatureWriter

WANTED = digests(8)
KIND = spec(query_tokens=4, width=32)


@pytest.fixture
def folder(tmp_path):
    build(tmp_path / "cache", WANTED)
    return tmp_path / "cache"


def damage_row(folder, part, row):
    layout = inspect_part(folder / f"features-{part:05d}.h5")
    flip(layout.path, layout.features_offset + row * layout.spec.row_bytes + 3, bit=5)


def problems(folder):
    return [(damage.file, damage.row) for damage in verify(folder).damage]


# Verification


def test_verify_accepts_sound_cache(folder):
    seen = []
    found = verify(folder, seen.append)
    files = [path for path in folder.iterdir() if path.stat().st_size]  # not .lock, which is empty
    assert found.damage == []
    assert (found.files, found.rows) == (len(files), 8) == (6, 8)
    parts = sum(path.stat().st_size for path in files if path.name.startswith("features"))
    assert sum(seen) == parts < found.bytes <= sum(path.stat().st_size for path in files)


def test_verify_reports_file_and_row_of_every_damage(folder):
    damage_row(folder, 0, 2)
    damage_row(folder, 1, 0)
    flip(folder / "features-00002.h5", 60)
    text, attachment = next(folder.glob("text-*")), next(folder.glob("skipped-*"))
    flip(text, 900)
    attachment.unlink()
    assert sorted(problems(folder), key=str) == sorted(
        [
            ("features-00000.h5", 2),
            ("features-00001.h5", 0),
            ("features-00002.h5", None),
            (text.name, None),
            (attachment.name, None),
        ],
        key=str,
    )


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"0", lambda data: b""])
def test_verify_reports_file_of_wrong_length(folder, change):
    path = folder / "features-00001.h5"
    path.write_bytes(change(path.read_bytes()))
    assert problems(folder) == [(path.name, None)]


def test_verify_reports_part_of_another_cache(folder, tmp_path):
    build(tmp_path / "other", digests(8, start=50))
    shutil.copy(tmp_path / "other" / "features-00001.h5", folder)
    assert problems(folder) == [("features-00001.h5", None)]


def test_file_named_like_a_part_is_reported_and_rejected_by_writer(folder, tmp_path):
    stray = folder / "features-00042.h5"
    build(tmp_path / "other", digests(2), spec(width=8))
    for data in (bytes(50_000), (tmp_path / "other" / "features-00000.h5").read_bytes()):
        stray.write_bytes(data)
        assert verify(folder).damage == [Damage(stray.name, NOT_A_PART)]
        assert describe(folder).unlisted == [stray.name]
        with pytest.raises(
            CacheError, match=r"features-00042\.h5: is not a part of this cache: .*Delete this one file"
        ) as caught:
            build(folder, WANTED)
        assert "synchronously" not in str(caught.value)
    stray.unlink()
    assert (build(folder, WANTED), verify(folder).damage, describe(folder).unlisted) == ([], [], [])


def test_damage_has_no_path_and_no_advice(folder):
    flip(folder / "features-00000.h5", 60)
    (folder / "features-00001.h5").write_bytes(b"")
    (folder / "features-00002.h5").unlink()
    flip(next(folder.glob("text-*")), 900)
    for damage in verify(folder).damage:
        assert damage.file not in damage.problem
        assert "pipe" not in damage.problem


def test_verify_requires_sound_manifest(folder):
    flip(folder / "manifest.json", 100)
    with pytest.raises(CacheError, match="manifest"):
        verify(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(CacheError, match="no finished cache"):
        verify(folder)
    with pytest.raises(CacheError, match="no finished cache"):
        verify(folder / "absent")


def read_all(folder):
    """Return whether every row, text and attachment is correct; the only alternative is CacheError."""
    try:
        assert stored_rows(folder, KIND) == set(WANTED)
        with FeatureReader(folder) as reader:
            np.testing.assert_array_equal(reader.gather(reader.text("train").image_row), features(WANTED, KIND))
            assert reader.attachment("skipped.jsonl").read_bytes() == b'{"reason": "none"}\n'
    except CacheError:
        return False
    return True


@pytest.mark.parametrize("flips", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_flipped_bit_is_reported_and_never_read(tmp_path, flips):
    build(tmp_path, WANTED, KIND)
    rng = random.Random(flips)
    files = sorted(path for path in tmp_path.iterdir() if path.stat().st_size)
    starts = {path: inspect_part(path).features_offset for path in files if path.name.startswith("features")}
    for _ in range(flips):
        path = rng.choice(files)
        first = rng.choice([0, starts.get(path, 0)])  # half of them in the features
        byte, bit = rng.randrange(first, path.stat().st_size), rng.randrange(8)
        flip(path, byte, bit)
        try:
            found = verify(tmp_path).damage
        except CacheError:
            found = [path.name]
        assert found, f"{path.name}: byte {byte}, bit {bit}"
        assert not read_all(tmp_path)
        flip(path, byte, bit)
    assert verify(tmp_path).damage == []
    assert read_all(tmp_path)


# Repair


def rows_of(folder):
    with FeatureReader(folder) as reader:
        return dict(reader.stored())


def test_damaged_rows_are_rewritten_and_other_rows_keep_their_numbers(folder):
    before = rows_of(folder)
    damage_row(folder, 0, 1)
    damage_row(folder, 2, 0)
    damage_row(folder, 2, 1)
    bad = [WANTED[1], WANTED[6], WANTED[7]]
    assert drop_damaged(folder, verify(folder).damage) == 3
    lost = verify(folder).damage
    assert [(damage.problem, damage.row) for damage in lost] == [(NOT_STORED, row) for row in (1, 0, 1)]
    dropped = contents(folder)
    assert drop_damaged(folder, lost) == 0
    assert contents(folder) == dropped
    assert rows_of(folder) == {digest: row for digest, row in before.items() if digest not in bad}
    with (
        FeatureReader(folder) as reader,
        pytest.raises(CacheError, match=r"row 1 .*never written.*pipe precompute.*its image"),
    ):
        reader.gather(reader.text("train").image_row)
    assert build(folder, WANTED) == bad
    assert {digest: row for digest, row in rows_of(folder).items() if digest not in bad} == {
        digest: row for digest, row in before.items() if digest not in bad
    }
    assert stored_rows(folder, spec()) == set(WANTED)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path, 0),
        lambda path: flip(path, inspect_part(path).crc_offset + 8),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
    ids=["head", "checksum", "cut", "empty", "missing"],
)
def test_damaged_part_is_rewritten_and_other_rows_keep_their_numbers(folder, damage):
    before = rows_of(folder)
    damage(folder / "features-00001.h5")
    assert drop_damaged(folder, verify(folder).damage) == 3
    kept = {digest: row for digest, row in before.items() if row not in (3, 4, 5)}
    assert rows_of(folder) == kept
    assert build(folder, WANTED) == WANTED[3:6]
    assert len(rows_of(folder)) == len(WANTED)
    assert stored_rows(folder, spec()) == set(WANTED)
    assert verify(folder).damage == []


def test_damaged_text_is_rewritten_by_next_run(folder):
    before = contents(folder)
    flip(next(folder.glob("text-*")), 1000)
    flip(next(folder.glob("skipped-*")), 3)
    assert drop_damaged(folder, verify(folder).damage) == 0
    assert build(folder, WANTED) == []
    assert contents(folder) == before


def test_unwritten_rows_stay_unwritten_in_repair(tmp_path):
    with FeatureWriter(tmp_path, spec(), WANTED[:5]) as writer, PartWriter(writer.parts[0]) as part:
        put(part, 0, 2, 4)
        part.mark_failed(np.array([1]))
        part.seal()
        writer.finish({"train": table([0, 2])})
    damage_row(tmp_path, 0, 2)
    assert drop_damaged(tmp_path, verify(tmp_path).damage) == 1
    assert rows_of(tmp_path) == {WANTED[0]: 0, WANTED[4]: 4}
    assert verify(tmp_path).rows == 2
    with FeatureWriter(tmp_path, spec(), WANTED[:5]) as writer:
        assert to_write(writer) == [WANTED[1], WANTED[2], WANTED[3]]


def test_dropped_rows_exclude_unwritten_rows(tmp_path):
    with FeatureWriter(tmp_path, spec(), WANTED[:5], 3) as writer:
        for path, rows in zip(writer.parts, ([0, 2], [1]), strict=True):
            with PartWriter(path) as part:
                put(part, *rows)
                part.mark_failed(part.unwritten_rows)
                part.seal()
        writer.finish({})
    flip(tmp_path / "features-00000.h5", 8)
    assert drop_damaged(tmp_path, verify(tmp_path).damage) == 2
    assert verify(tmp_path).rows == 1
    assert rows_of(tmp_path) == {WANTED[4]: 4}


def test_drop_damaged_without_damage_changes_nothing(folder):
    before = contents(folder)
    assert drop_damaged(folder, []) == 0
    assert drop_damaged(folder, [Damage("notes.txt", "mine")]) == 0
    assert contents(folder) == before


def test_repair_is_refused_while_cache_is_written(folder, monkeypatch):
    monkeypatch.setattr("cache.lock.LOCK_TIMEOUT_SECONDS", 0)
    damage_row(folder, 0, 1)
    damages = verify(folder).damage
    before = contents(folder)
    with FeatureWriter(folder, spec(), WANTED), pytest.raises(CacheError, match="is writing this cache"):
        drop_damaged(folder, damages)
    assert contents(folder) == before


def test_full_disk_during_repair_leaves_cache_unchanged(folder, monkeypatch):
    damage_row(folder, 0, 1)
    damages, before = verify(folder).damage, rows_of(folder)
    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(CacheError, match=r"No space left.*(R|r)un the same command again"):
            drop_damaged(folder, damages)
    assert rows_of(folder) == before
    assert drop_damaged(folder, damages) == 1
    assert build(folder, WANTED) == [WANTED[1]]
    assert {path.name.split("-")[0] for path in folder.iterdir()} == {
        ".lock",
        "features",
        "skipped",
        "manifest.json",
        "text",
    }


def repair(folder):
    drop_damaged(folder, verify(folder).damage)


def damage_rows(folder):
    damage_row(folder, 0, 1)
    damage_row(folder, 1, 0)
    damage_row(folder, 1, 1)  # all of this part


def lose_a_part(folder):
    (folder / "features-00001.h5").unlink()


def damage_a_head(folder):
    flip(folder / "features-00000.h5", 100)


@pytest.mark.parametrize("damage", [damage_rows, lose_a_part, damage_a_head])
def test_killed_repair_leaves_old_or_new_cache(tmp_path, damage):
    folder, wanted = tmp_path / "damaged", WANTED[:5]
    build(folder, wanted)
    damage(folder)
    shutil.copytree(folder, tmp_path / "repaired")
    old = (folder / "manifest.json").read_bytes()
    steps = undisturbed(lambda: repair(tmp_path / "repaired"))
    new = (tmp_path / "repaired" / "manifest.json").read_bytes()
    shutil.copytree(tmp_path / "repaired", tmp_path / "whole")
    lost = problems(tmp_path / "repaired")
    written_again = build(tmp_path / "whole", wanted)
    found = set()
    for step in range(1, steps + 1):
        copy = tmp_path / str(step)
        shutil.copytree(folder, copy)
        killed(step, lambda copy=copy: repair(copy))
        manifest = (copy / "manifest.json").read_bytes()
        assert manifest in (old, new)
        found.add(manifest)
        assert problems(copy) == (problems(folder) if manifest == old else lost)
        repair(copy)
        assert build(copy, wanted) == written_again
        assert stored_rows(copy, spec()) == set(wanted)
        assert len([*copy.glob("features-*")]) == len([*(tmp_path / "whole").glob("features-*")]), "leftover parts"
    assert found == {old, new}


def test_repaired_cache_can_be_finished_without_lost_images(folder):
    damage_row(folder, 1, 1)
    repair(folder)
    with FeatureWriter(folder, spec(), WANTED, 3) as writer:
        for path in writer.parts:
            with PartWriter(path) as part:
                part.mark_failed(part.unwritten_rows)
                part.seal()
        writer.finish(texts_of(writer, WANTED))
    assert stored_rows(folder, spec()) == {*WANTED} - {WANTED[4]}


# Unreadable files


def unreadable_rows(monkeypatch, part, rows, number=5):
    """Make every read of these rows of the part fail."""
    layout, size = inspect_part(part), spec().row_bytes
    read, inode = cache.audit.pread_into, part.stat().st_ino

    def refuse(descriptor, data, offset):
        first = (offset - layout.features_offset) // size
        touched = range(first, first + -(-len(data) // size))
        if os.fstat(descriptor).st_ino == inode and set(touched) & set(rows):
            raise OSError(number, os.strerror(number))
        read(descriptor, data, offset)

    monkeypatch.setattr("cache.audit.pread_into", refuse)


def test_bad_disk_block_damages_only_its_rows(folder, monkeypatch):
    part = folder / "features-00001.h5"
    unreadable_rows(monkeypatch, part, [1])
    damages = verify(folder).damage
    assert [(d.file, d.row, d.unreadable) for d in damages] == [(part.name, 1, False)]
    assert drop_damaged(folder, damages) == 1
    monkeypatch.undo()
    assert stored_rows(folder, spec()) == {*WANTED} - {WANTED[4]}


@pytest.mark.parametrize(("rows", "number"), [([0, 1, 2], 5), ([1], 13), ([1], 24), ([1], 116)])
def test_unreadable_part_is_not_dropped(folder, monkeypatch, rows, number):
    before = contents(folder)
    unreadable_rows(monkeypatch, folder / "features-00001.h5", rows, number)
    damages = verify(folder).damage
    assert [(d.file, d.row, d.unreadable) for d in damages] == [("features-00001.h5", None, True)]
    assert os.strerror(number) in damages[0].problem
    assert drop_damaged(folder, damages) == 0
    assert contents(folder) == before


@pytest.mark.parametrize("where", ["cache.audit.open_descriptor", "cache.parts.inspect_part"])
def test_file_that_cannot_be_opened_is_unreadable_not_damaged(folder, monkeypatch, where):
    stray = folder / "features-00042.h5"
    stray.write_bytes(bytes(50_000))
    error = UnreadableError(stray, "cannot be read: Too many open files", "") if "inspect" in where else OSError(24, "")
    monkeypatch.setattr(where, lambda *_: (_ for _ in ()).throw(error))
    before = contents(folder)
    damages = verify(folder).damage
    found = {damage.file for damage in damages if damage.unreadable}
    assert found == ({stray.name} if "inspect" in where else {f"features-0000{index}.h5" for index in range(3)})
    assert drop_damaged(folder, damages) == 0
    assert contents(folder) == before


@pytest.mark.parametrize("where", ["cache.format.sha256_of", "cache.hdf5.h5py.File"])
def test_head_that_cannot_be_read_is_unreadable_not_damaged(folder, monkeypatch, where):
    error = OSError(24, "Unable to open file (errno = 24, error message = 'Too many open files')")
    monkeypatch.setattr(where, lambda *_, **__: (_ for _ in ()).throw(error))
    damages = verify(folder).damage
    assert damages
    assert all(damage.unreadable for damage in damages)
    assert drop_damaged(folder, damages) == 0
