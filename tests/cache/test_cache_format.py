import time

import h5py
import numpy as np
import pytest
from cache_fakes import D, Q, digests, flip, spec

from cache.files import sha256_of
from cache.format import create_part, head_sha256, inspect_part
from cache.hdf5 import read_arrays, write_arrays
from cache.part import PartWriter
from cache.spec import CacheError

ROWS = 4


def make(path, kind=None, rows=ROWS):
    create_part(path, kind or spec(), np.frombuffer(b"".join(digests(rows)), np.uint8).reshape(-1, 32))
    return path


def tampered(tmp_path, name, replace):
    """Create a part and replace its data set `name` by what `replace(file, name)` creates."""
    path = make(tmp_path / "part.h5")
    with h5py.File(path, "r+") as file:
        del file[name]
        replace(file, name)
    return path


def test_create_part_writes_no_row(tmp_path):
    layout = inspect_part(make(tmp_path / "part.h5"))
    assert (layout.spec, layout.rows) == (spec(), ROWS)
    assert [row.tobytes() for row in layout.digests] == digests(ROWS)
    assert layout.crc32.tolist() == [-1] * ROWS
    assert list(tmp_path.iterdir()) == [layout.path]


def test_file_bytes_depend_only_on_content(tmp_path):
    """The digests are those of HDF5 2.0; HDF5 1.14 stores times by default."""
    part = make(tmp_path / "part.h5", spec(query_tokens=32, width=768))
    write_arrays(tmp_path / "text.h5", {"numbers": np.arange(5)}, {"name": "a text", "version": 1})
    assert [sha256_of(path) for path in (part, tmp_path / "text.h5")] == [
        "2d445c4d57d48cf9e19f688f77f25d8a52e16ee0a46a819efaba3655246b58ca",
        "c92ddfd2cefe13748e083cff3aada450fc029db46a28d096078eb97690396052",
    ]


def test_features_are_page_aligned(tmp_path):
    layout = inspect_part(make(tmp_path / "part.h5", spec(query_tokens=32, width=768)))
    assert layout.features_offset % 4096 == 0


def test_features_come_last(tmp_path):
    layout = inspect_part(make(tmp_path / "part.h5"))
    with h5py.File(layout.path) as file:
        digests_offset = file["image_digest"].id.get_offset()
        headers = [h5py.h5o.get_info(file[name].id).addr for name in file]
    assert digests_offset < layout.crc_offset < layout.features_offset
    assert max(headers) < layout.features_offset
    assert layout.features_offset + ROWS * layout.spec.row_bytes == layout.path.stat().st_size


def test_head_sha256_skips_only_the_checksums(tmp_path):
    layout = inspect_part(make(tmp_path / "part.h5"))
    place = (layout.features_offset, layout.crc_offset, layout.rows)
    before = head_sha256(layout.path, *place)
    for byte in (layout.crc_offset, layout.crc_offset + 8 * ROWS - 1, layout.features_offset):
        flip(layout.path, byte)
        assert head_sha256(layout.path, *place) == before
    for byte in (0, layout.crc_offset - 1, layout.crc_offset + 8 * ROWS, layout.features_offset - 1):
        flip(layout.path, byte)
        assert head_sha256(layout.path, *place) != before
        flip(layout.path, byte)


@pytest.mark.parametrize("length", [10, 3_000, 60_000])
def test_long_preprocessing_fits_into_head(tmp_path, length):
    kind = spec(image_preprocessing=f'{{"a":"{"x" * length}"}}')
    assert inspect_part(make(tmp_path / "part.h5", kind)).spec == kind


def test_unfinished_part_can_be_inspected(tmp_path):
    with PartWriter(make(tmp_path / "part.h5")) as part:
        assert inspect_part(part.path).rows == ROWS


def test_file_bytes_do_not_depend_on_time(tmp_path):
    first = make(tmp_path / "a.h5").read_bytes()
    write_arrays(tmp_path / "c.h5", {"x": np.arange(3)}, {"y": "z"})
    time.sleep(1.1)  # HDF5 keeps times in seconds
    assert make(tmp_path / "b.h5").read_bytes() == first
    write_arrays(tmp_path / "d.h5", {"x": np.arange(3)}, {"y": "z"})
    assert (tmp_path / "c.h5").read_bytes() == (tmp_path / "d.h5").read_bytes()


def external_link(file, name):
    file[name] = h5py.ExternalLink("other.h5", name)


def soft_link(file, name):
    file[name] = h5py.SoftLink("/crc32")


def virtual(file, name):
    layout = h5py.VirtualLayout(shape=(ROWS, Q, D), dtype="<f2")
    layout[:] = h5py.VirtualSource("other.h5", name, shape=(ROWS, Q, D))
    file.create_virtual_dataset(name, layout)


def external_storage(file, name):
    file.create_dataset(name, (ROWS, Q, D), "<f2", external=[("/etc/hostname", 0, ROWS * Q * D * 2)])


def chunked(file, name):
    file.create_dataset(name, data=np.zeros((ROWS, Q, D), "<f2"), chunks=(1, Q, D))


def compressed(file, name):
    file.create_dataset(name, data=np.zeros((ROWS, Q, D), "<f2"), compression="gzip")


def wrong_shape(file, name):
    file.create_dataset(name, data=np.zeros((ROWS - 1, Q, D), "<f2"))


def big_endian(file, name):
    file.create_dataset(name, data=np.zeros((ROWS, Q, D), ">f2"))


def group(file, name):
    file.create_group(name)


def text(file, name):
    file.create_dataset(name, data=["a", "b"])


def unallocated(file, name):
    file.create_dataset(name, (ROWS, Q, D), "<f2")


REFUSED = {
    external_link: "ExternalLink",
    soft_link: "SoftLink",
    virtual: "virtual",
    external_storage: "external storage",
    chunked: "chunked",
    compressed: "chunked",
    wrong_shape: r"\(3, 2, 5\)",
    big_endian: ">f2",
    group: "Group",
    text: "plain numbers",
    unallocated: "truncated",
}


@pytest.mark.parametrize(("trick", "words"), REFUSED.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_unsafe_dataset_is_rejected(tmp_path, trick, words):
    path = tampered(tmp_path, "query_features", trick)
    with pytest.raises(CacheError, match=words) as caught:
        inspect_part(path)
    assert str(caught.value).startswith(str(path))
    if trick not in (wrong_shape, big_endian):  # allowed in files that are not parts
        with pytest.raises(CacheError, match=words):
            read_arrays(path)


def test_missing_or_extra_datasets_are_rejected(tmp_path):
    with pytest.raises(CacheError, match="data sets"):
        inspect_part(tampered(tmp_path, "crc32", lambda file, name: None))
    with pytest.raises(CacheError, match="data sets"):
        inspect_part(tampered(tmp_path, "crc32", lambda file, name: file.update({name: [1], "more": [1]})))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("crc32", "image_digest", "query_features"), "crc32 begins at"),
        (("query_features", "image_digest", "crc32"), "image_digest begins at|query_features begins at"),
    ],
)
def test_wrong_dataset_order_is_rejected(tmp_path, names, words):
    arrays = {"image_digest": np.zeros((ROWS, 32), np.uint8), "crc32": np.zeros(ROWS, np.int64)}
    arrays |= {"query_features": np.zeros((ROWS, Q, D), np.float16)}
    write_arrays(tmp_path / "part.h5", {name: arrays[name] for name in names}, spec().to_attributes())
    with pytest.raises(CacheError, match=words):
        inspect_part(tmp_path / "part.h5")


def test_bytes_after_features_are_rejected(tmp_path):
    path = make(tmp_path / "part.h5")
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(CacheError, match="must end with its features"):
        inspect_part(path)


def test_truncated_part_is_rejected(tmp_path):
    path = make(tmp_path / "part.h5", spec(query_tokens=32, width=768))
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CacheError, match=r"part\.h5"):
        inspect_part(path)


def test_other_or_missing_file_raises_cache_error(tmp_path):
    (tmp_path / "text.h5").write_text("no HDF5")
    for name in ("text.h5", "absent.h5"):
        with pytest.raises(CacheError, match=name):
            inspect_part(tmp_path / name)


def test_arrays_round_trip(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.uint8).reshape(2, 3), "none": np.empty(0, np.int64)}
    write_arrays(tmp_path / "x.h5", arrays, {"text": "Grüße", "number": 3})
    found, attributes = read_arrays(tmp_path / "x.h5")
    assert attributes == {"text": "Grüße", "number": 3}
    assert {name: (a.dtype, a.tolist()) for name, a in found.items()} == {
        name: (a.dtype, a.tolist()) for name, a in arrays.items()
    }
