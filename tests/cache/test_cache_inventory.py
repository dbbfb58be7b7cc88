import hashlib

import pytest
from cache_fakes import build, contents, digests, flip, spec, stored_rows, write_some
from cache_kill import killed, undisturbed

from cache.audit import verify
from cache.inventory import describe, find_caches, remove
from cache.ownership import own_files
from cache.reader import FeatureReader
from cache.spec import CacheError, UnreadableError
from cache.writer import FeatureWriter

WANTED = digests(8)


def test_describe_finished_cache(tmp_path):
    build(tmp_path, WANTED)
    (tmp_path / "thesis.txt").write_text("mine")
    found = describe(tmp_path)
    with FeatureReader(tmp_path) as reader:
        assert found.manifest == reader.manifest
    assert (found.sealed, found.in_progress, found.other_files) == (3, 0, ["thesis.txt"])
    assert found.bytes >= 8 * spec().row_bytes


def test_describe_unfinished_cache(tmp_path):
    with FeatureWriter(tmp_path, spec(), WANTED, part_rows=3) as writer:
        write_some(writer, limit=4)
        found = describe(tmp_path)
    assert (found.manifest, found.sealed, found.in_progress, found.other_files) == (None, 1, 2, [])


def test_unfinished_part_counts_with_its_disk_usage(tmp_path):
    kind = spec(query_tokens=32, width=768)
    FeatureWriter(tmp_path, kind, digests(1024)).close()
    assert describe(tmp_path).bytes < 1024 * kind.row_bytes / 10


def test_describe_rejects_missing_and_damaged_cache(tmp_path):
    (tmp_path / "train.jsonl").write_text("mine")
    for folder in (tmp_path, tmp_path / "absent", tmp_path / "train.jsonl"):
        with pytest.raises(CacheError, match=r"no cache found.*pipe cache ls"):
            describe(folder)
    build(tmp_path / "cache", WANTED[:1])
    flip(tmp_path / "cache" / "manifest.json", 30)
    with pytest.raises(CacheError, match=r"manifest\.json: cannot be used"):
        describe(tmp_path / "cache")


def test_find_caches_searches_recursively(tmp_path):
    build(tmp_path / "b" / "finished", WANTED[:1])
    FeatureWriter(tmp_path / "a", spec(), WANTED).close()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(b"")
    assert find_caches(tmp_path) == [tmp_path / "a", tmp_path / "b" / "finished"]
    assert find_caches(tmp_path / "a") == [tmp_path / "a"]
    assert find_caches(tmp_path / "pictures") == find_caches(tmp_path / "absent") == []


@pytest.mark.parametrize("finished", [True, False])
def test_remove_deletes_cache_and_folder(tmp_path, finished):
    folder = tmp_path / "cache"
    if finished:
        build(folder, WANTED)
    else:
        FeatureWriter(folder, spec(), WANTED, part_rows=3).close()
    (folder / "features-00009.h5.partial.tmp").write_bytes(b"half of")
    size = describe(folder).bytes
    assert remove(folder) == size > 0
    assert not folder.exists()


def test_remove_keeps_other_files(tmp_path):
    build(tmp_path / "cache", WANTED)
    mine = dict.fromkeys(("thesis.txt", "train.jsonl", "annotations.h5", "text-mine.h5", ".hidden"), b"mine")
    for name, data in mine.items():
        (tmp_path / "cache" / name).write_bytes(data)
    assert sorted(describe(tmp_path / "cache").other_files) == sorted(mine)
    remove(tmp_path / "cache")
    assert contents(tmp_path / "cache") == mine
    with pytest.raises(CacheError, match="nothing was deleted"):
        remove(tmp_path / "cache")
    assert contents(tmp_path / "cache") == mine


def test_damaged_cache_can_be_removed(tmp_path):
    build(tmp_path / "cache", WANTED)
    flip(tmp_path / "cache" / "manifest.json", 30)
    (tmp_path / "cache" / "features-00001.h5").write_bytes(b"")
    remove(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_cache_being_written_is_not_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("cache.lock.LOCK_TIMEOUT_SECONDS", 0)
    build(tmp_path, WANTED[:1])
    with FeatureWriter(tmp_path, spec(), WANTED, part_rows=3):
        before = contents(tmp_path)
        with pytest.raises(CacheError, match="is writing this cache"):
            remove(tmp_path)
        assert contents(tmp_path) == before


def test_cache_can_be_removed_from_full_disk(tmp_path, monkeypatch):
    build(tmp_path / "cache", WANTED)
    monkeypatch.setattr("os.pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    remove(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_partly_removed_cache_is_never_read(tmp_path):
    build(tmp_path / "whole", WANTED)
    steps = undisturbed(lambda: remove(tmp_path / "whole"))
    for step in range(1, steps + 1):
        folder = tmp_path / str(step)
        build(folder, WANTED)
        killed(step, lambda folder=folder: remove(folder))
        if (folder / "manifest.json").exists():
            assert stored_rows(folder, spec()) == set(WANTED)
        else:
            with pytest.raises(CacheError, match=r"unfinished|no cache"):
                FeatureReader(folder)
        if {path.name for path in folder.iterdir()} - {".lock"}:
            remove(folder)
            assert not folder.exists()


FOREIGN = {"predictions-202401011234.jsonl": b"mine", "text-old-0123456789ab.h5": b"mine", "notes.txt": b"mine"}


def test_files_named_like_cache_files_are_kept(tmp_path):
    for name, data in FOREIGN.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(CacheError, match="contains other files"):
        build(tmp_path, WANTED)
    assert contents(tmp_path) == FOREIGN
    build(tmp_path / "cache", WANTED)
    for name, data in FOREIGN.items():
        (tmp_path / "cache" / name).write_bytes(data)
    build(tmp_path / "cache", WANTED[:4])
    assert sorted(describe(tmp_path / "cache").other_files) == sorted(FOREIGN)
    remove(tmp_path / "cache")
    assert contents(tmp_path / "cache") == FOREIGN


def test_leftover_of_killed_writer_is_recognized_by_content(tmp_path):
    build(tmp_path, WANTED)
    left = tmp_path / f"skipped-{hashlib.sha256(b'old').hexdigest()[:12]}.jsonl"
    left.write_bytes(b"old")
    build(tmp_path, WANTED)
    assert not left.exists()


def test_manifest_of_another_program_is_not_a_cache(tmp_path):
    mine = {"manifest.json": b'{"name": "my app"}', "plan.json": b"[]", "index.html": b"x"}
    for name, data in mine.items():
        (tmp_path / name).write_bytes(data)
    assert find_caches(tmp_path) == []
    for call in (describe, remove):
        with pytest.raises(CacheError, match="no cache found"):
            call(tmp_path)
    with pytest.raises(CacheError, match="contains other files"):
        build(tmp_path, WANTED)
    assert contents(tmp_path) == mine


def test_remove_rejects_link_to_cache(tmp_path):
    build(tmp_path / "cache", WANTED)
    (tmp_path / "link").symlink_to("cache")
    with pytest.raises(CacheError, match=r"is a link to .*cache\. Nothing was deleted; name that folder itself"):
        remove(tmp_path / "link")
    assert stored_rows(tmp_path / "cache", spec()) == set(WANTED)


def test_describe_tolerates_files_renamed_meanwhile(tmp_path, monkeypatch):
    build(tmp_path, WANTED)
    monkeypatch.setattr("cache.inventory.own_files", lambda folder: [*own_files(folder), folder / "features-00009.h5"])
    assert describe(tmp_path).bytes > 0


def test_unreadable_manifest_raises_cache_error(tmp_path, monkeypatch):
    build(tmp_path, WANTED)
    denied = PermissionError(13, "Permission denied")
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda _: (_ for _ in ()).throw(denied))
    for use in (describe, verify, FeatureReader):
        with pytest.raises(UnreadableError, match=r"manifest\.json: cannot be read: Permission denied"):
            use(tmp_path)
