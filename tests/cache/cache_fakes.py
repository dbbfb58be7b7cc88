"""Small hand-made caches for the tests of `cache`."""

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
    """Finite numbers that depend on the digest only: (n, Q, D)."""
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
    """Writes batches until nothing is open or `limit` images are written; -> digests in the order written."""
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
    """Digests of the images still to be written, in order."""
    parts = [inspect_part(path) for path in writer.parts]
    return [part.digests[row].tobytes() for part in parts for row in np.flatnonzero(part.crc32 == -1)]


def build(folder, wanted, kind=None, part_rows=3, sources=()):
    """One run over the wanted images, to the end; -> the digests that it wrote."""
    with FeatureWriter(Path(folder), kind or spec(), wanted, part_rows, sources) as writer:
        written = write_some(writer)
        writer.finish(texts_of(writer, wanted), {"left-out.jsonl": b'{"reason": "none"}\n'}, {"model": "fake"})
    return written


def edit_manifest(folder, change, name="manifest.json"):
    """Has `change` alter the manifest, or the plan, and signs it again."""
    content = json.loads((folder / name).read_bytes())
    del content["sha256"]
    change(content)
    _save_checksummed(folder / name, content)


def flip(path, byte, bit=0):
    """Flips one bit of a file in place."""
    with Path(path).open("r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ 1 << bit]))


def texts_of(writer, wanted):
    """One question on each of the images that are stored, in order."""
    rows = writer.rows()
    return {"train": table([rows[digest] for digest in wanted if digest in rows])}


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def put(part, *rows):
    """Writes rows of a part in work."""
    if rows:
        wanted = [part.digests[row].tobytes() for row in rows]
        part.write(np.array(rows), features(wanted, part.spec))


def stored_rows(folder, kind):
    """Digests of a finished cache of which every row that it serves was found to hold the right numbers."""
    with FeatureReader(Path(folder)) as reader:
        rows = dict(reader.stored())
        np.testing.assert_array_equal(reader.gather([*rows.values()]), features(rows, kind))
        for split in reader.splits:
            assert len(reader.text(split)) == reader.splits[split]
        return set(rows)
