"""Small caches for tests."""

import hashlib
import json
from pathlib import Path

import numpy as np

from cache.format import inspect_part
from cache.manifest import _save_checksummed
from cache.part import PartWriter
from cache.reader import FeatureReader
from cache.spec import CacheSpec
from cache.text import Ragged, TextTable
from cache.writer import FeatureWriter

Q, D = 2, 5


def spec(dtype="float16", **changes):
    preprocessing = json.dumps({"size": 224, "mean": [0.5, 0.5, 0.5]})
    fields = {"encoder_fingerprint": "ab" * 32, "encoder_dtype": "float32", "image_preprocessing": preprocessing}
    return CacheSpec(**(fields | {"query_tokens": Q, "width": D, "dtype": dtype} | changes))


def digests(count, start=0):
    return [hashlib.sha256(f"image {i}".encode()).digest() for i in range(start, start + count)]


def features(wanted, kind):
    """Return finite features (n, Q, D) that depend only on the digests."""
    rows = [np.random.default_rng(list(digest)).normal(size=(kind.query_tokens, kind.width)) for digest in wanted]
    values = np.asarray(rows, np.float32).reshape(-1, kind.query_tokens, kind.width)
    if kind.dtype == "bfloat16":
        return (values.view("<u4") >> 16).astype("<u2")
    return values.astype(kind.storage_dtype)


def table(rows):
    questions = [f"Wie groß ist Bild {i}? 🐘" for i in range(len(rows))]
    return TextTable(
        records=Ragged.from_rows(
            [json.dumps({"question": q}, ensure_ascii=False).encode() for q in questions], np.uint8
        ),
        image_row=np.asarray(rows, np.int64),
        prompt_ids=Ragged.from_rows([range(i) for i in range(len(rows))], np.int32),
        target_ids=Ragged.from_rows([[7, 2]] * len(rows), np.int32),
        prompt="Question: {question} Answer:",
        tokenizer="cd" * 32,
    )


def write_some(writer, limit=None, batch=2):
    """Write batches until all or `limit` images are written; return their digests in order."""
    written = []
    for path in writer.parts:
        with PartWriter(path) as part:
            for places in part.unwritten_batches(batch):
                rows = np.intersect1d(places, part.unwritten_rows)[: None if limit is None else limit - len(written)]
                wanted = [part.digests[row].tobytes() for row in rows]
                part.write(rows, features(wanted, writer.spec))
                written += wanted
                if len(written) == limit:
                    return written
            part.seal()
    return written


def to_write(writer):
    """Return the digests of the unwritten images, in order."""
    parts = [inspect_part(path) for path in writer.parts]
    return [part.digests[row].tobytes() for part in parts for row in np.flatnonzero(part.crc32 == -1)]


def build(folder, wanted, kind=None, part_rows=3, sources=()):
    """Write and finish a cache of the wanted images; return the digests that were written."""
    with FeatureWriter(Path(folder), kind or spec(), wanted, part_rows, sources) as writer:
        written = write_some(writer)
        writer.finish(texts_of(writer, wanted), {"skipped.jsonl": b'{"reason": "none"}\n'}, {"model": "fake"})
    return written


def edit_manifest(folder, change, name="manifest.json"):
    """Change the manifest or the plan and update its checksum."""
    content = json.loads((folder / name).read_bytes())
    del content["sha256"]
    change(content)
    _save_checksummed(folder / name, content)


def flip(path, byte, bit=0):
    """Flip one bit of a file."""
    with Path(path).open("r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ 1 << bit]))


def texts_of(writer, wanted):
    """Return one question about each stored image, in order."""
    rows = writer.rows()
    return {"train": table([rows[digest] for digest in wanted if digest in rows])}


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def put(part, *rows):
    """Write rows of an unfinished part."""
    if rows:
        wanted = [part.digests[row].tobytes() for row in rows]
        part.write(np.array(rows), features(wanted, part.spec))


def stored_rows(folder, kind):
    """Return the digests that a finished cache stores, after checking every row."""
    with FeatureReader(Path(folder)) as reader:
        rows = dict(reader.stored())
        np.testing.assert_array_equal(reader.gather([*rows.values()]), features(rows, kind))
        for split in reader.splits:
            assert len(reader.text(split)) == reader.splits[split]
        return set(rows)
