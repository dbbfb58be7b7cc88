"""Small hand-made caches for the tests of `cache`."""

import hashlib
import json
from pathlib import Path

import numpy as np

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
    """Writes batches until nothing is pending or `limit` images are written; -> digests in the order written."""
    written = []
    while writer.pending and (limit is None or len(written) < limit):
        wanted = writer.pending[: batch if limit is None else min(batch, limit - len(written))]
        writer.write(wanted, features(wanted, writer.spec))
        written += wanted
    return written


def build(folder, wanted, kind=None, part_rows=3):
    """One run over the wanted images, to the end; -> the digests that it wrote."""
    with FeatureWriter(Path(folder), kind or spec(), wanted, part_rows) as writer:
        written = write_some(writer)
        writer.finish({"train": table([writer.rows[digest] for digest in wanted])}, {"model": "fake"})
    return written


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
