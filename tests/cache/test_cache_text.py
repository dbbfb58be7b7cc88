import hashlib
from dataclasses import replace

import numpy as np
import pytest
from cache_fakes import table

from cache.hdf5 import read_arrays, write_arrays
from cache.spec import CacheError
from cache.text import Ragged, TextTable


def test_ragged_rows():
    ragged = Ragged.from_rows([[1, 2], [], [3]], np.int32)
    assert [row.tolist() for row in ragged] == [[1, 2], [], [3]]
    assert (len(ragged), ragged.values.dtype, ragged.offsets.tolist()) == (3, np.int32, [0, 2, 2, 3])
    assert len(Ragged.from_rows([], np.int32)) == 0
    assert Ragged.from_rows([b"ab", b""], np.uint8)[0].tobytes() == b"ab"
    for i in (-1, 3):
        with pytest.raises(IndexError):
            ragged[i]


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 2, 1, 3], [0, 4], []])
def test_invalid_offsets_raise(offsets):
    with pytest.raises(CacheError, match="offsets"):
        Ragged(np.arange(3), np.array(offsets, np.int64))


@pytest.mark.parametrize("rows", [[4, 0, 0], []])
def test_table_round_trip(tmp_path, rows):
    mine = table(rows)
    entry = mine.save(tmp_path, "train")
    assert [path.name for path in tmp_path.iterdir()] == [entry.file]
    assert entry.questions == len(rows)
    found = TextTable.load(tmp_path / entry.file)
    assert len(found) == len(rows)
    assert [found.record(i) for i in range(len(rows))] == [
        {"question": f"Wie groß ist Bild {i}? 🐘"} for i in range(len(rows))
    ]
    assert (found.image_row.tolist(), found.prompt, found.tokenizer) == (rows, mine.prompt, mine.tokenizer)
    for name in ("prompt_ids", "target_ids"):
        assert [row.tolist() for row in getattr(found, name)] == [row.tolist() for row in getattr(mine, name)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a, _: a.pop("image_row"), "lacks 'image_row'"),
        (lambda a, _: a.update(image_row=a["image_row"][:-1]), "records has 3 rows"),
        (lambda a, _: a.update(image_row=-a["image_row"] - 1), "not negative"),
        (lambda a, _: a.update(prompt_ids=a["prompt_ids"].astype(np.int16)), "prompt_ids has 3 rows of int16"),
        (lambda a, _: a.update(target_ids=a["target_ids"][:-1]), "increase from 0 to 5"),
        (lambda _, b: b.pop("tokenizer"), "lacks 'tokenizer'"),
        (lambda _, b: b.update(format_version=2), "version 2"),
    ],
)
def test_damaged_table_raises(tmp_path, change, words):
    path = tmp_path / table([0, 1, 2]).save(tmp_path, "train").file
    arrays, attributes = read_arrays(path)
    change(arrays, attributes)
    write_arrays(path, arrays, attributes)
    with pytest.raises(CacheError, match=words) as caught:
        TextTable.load(path)
    assert str(caught.value).startswith(str(path))


def test_table_file_name_contains_its_digest(tmp_path):
    first, second = table([0, 1]).save(tmp_path, "val_2"), table([0, 2]).save(tmp_path, "val_2")
    assert {path.name for path in tmp_path.iterdir()} == {first.file, second.file}
    for entry in (first, second):
        digest = hashlib.sha256((tmp_path / entry.file).read_bytes()).hexdigest()
        assert (entry.file, entry.sha256) == (f"text-val_2-{digest[:12]}.h5", digest)
    assert table([0, 1]).save(tmp_path, "val_2") == first


@pytest.mark.parametrize("split", ["", "../x", "a b", "-x", "x/y", "ä"])
def test_invalid_split_name_raises(tmp_path, split):
    with pytest.raises(CacheError, match="not allowed as the name of a split"):
        table([0]).save(tmp_path, split)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("record", [b"[1]", b"{", b"\xff"])
def test_record_that_is_not_an_object_raises(record):
    broken = replace(table([0]), records=Ragged.from_rows([record], np.uint8))
    with pytest.raises(CacheError, match="record 0"):
        broken.record(0)
