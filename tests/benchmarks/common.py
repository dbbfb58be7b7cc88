"""What the benchmarks share: a cache of BLIP-2's shape, and a table of medians."""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from cache.part import PartWriter
from cache.spec import CacheSpec
from cache.text import Ragged, TextTable
from cache.writer import FeatureWriter

BATCH = 64
SPEC = CacheSpec(
    encoder_fingerprint="ab" * 32,
    encoder_dtype="float16",
    image_preprocessing=json.dumps({"size": 224}),
    query_tokens=32,
    width=768,
    dtype="float16",
)


def rows_of(gigabytes: float) -> int:
    return max(BATCH, int(gigabytes * 1e9) // SPEC.row_bytes)


def digests(count: int) -> list[bytes]:
    return [hashlib.sha256(b"%d" % row).digest() for row in range(count)]


def batches(count: int) -> Iterator[np.ndarray]:
    """Features (n, Q, D) of `count` images, no two rows alike."""
    pool = np.random.default_rng(0).normal(size=(BATCH, 32, 768)).astype("<f2")
    for start in range(0, count, BATCH):
        batch = pool[: min(BATCH, count - start)].copy()
        batch[:, 0, 0] = np.arange(start, start + len(batch)) % 1009
        batch[:, 0, 1] = np.arange(start, start + len(batch)) // 1009
        yield batch


def write_rows(folder: Path, count: int) -> None:
    """All the rows of a cache, in sealed parts of 1,024."""
    with FeatureWriter(folder, SPEC, digests(count)) as writer:
        write_parts(writer, batches(count))


def write_parts(writer: FeatureWriter, features: Iterator[np.ndarray]) -> None:
    for path in writer.parts:
        with PartWriter(path) as part:
            for rows in part.unwritten_batches(BATCH):
                part.write(np.asarray(rows), next(features))
            part.seal()


def make_cache(folder: Path, count: int) -> None:
    """A finished cache of `count` rows, without questions."""
    write_rows(folder, count)
    with FeatureWriter(folder, SPEC, digests(count)) as writer:
        writer.finish({"train": no_questions()})


def no_questions() -> TextTable:
    rows = [Ragged.from_rows([], dtype) for dtype in (np.uint8, np.int32, np.int32)]
    return TextTable(rows[0], np.empty(0, np.int64), rows[1], rows[2], "", "")


def print_table(unit: str, measured: Mapping[str, Sequence[float]], reference: Mapping[str, str]) -> None:
    """Median, lowest and highest of each series, and the ratio of its median to that of its reference."""
    print(f"{unit:>32} {'median':>10} {'lowest':>10} {'highest':>10} {'ratio':>7}  to")
    for name, values in measured.items():
        against = reference.get(name)
        ratio = f"{median(values) / median(measured[against]):7.3f}  {against}" if against else ""
        print(f"{name:>32} {median(values):10.4g} {min(values):10.4g} {max(values):10.4g} {ratio}")
