"""Writing a cache against plain sequential writing of the same bytes.

    python tests/benchmarks/write.py --gigabytes 1

Both take turns in one run. A cache is `FeatureWriter`, `PartWriter` in batches of 64 rows, and `finish`: with its CRCs,
checks and flushes. Plain is `os.write` of the same batches to one file and one `fsync`.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from common import BATCH, SPEC, batches, digests, no_questions, print_table, rows_of, write_parts

from cache.writer import FeatureWriter

POOL = [*batches(8 * BATCH)]
"""What is written again and again: making new numbers takes longer than writing them."""


def pooled(count: int) -> Iterator[np.ndarray]:
    return islice(cycle(POOL), count // BATCH)


def write_cache(folder: Path, images: list[bytes]) -> None:
    with FeatureWriter(folder, SPEC, images) as writer:
        write_parts(writer, pooled(len(images)))
        writer.finish({"train": no_questions()})


def write_plain(folder: Path, images: list[bytes]) -> None:
    folder.mkdir()
    descriptor = os.open(folder / "plain", os.O_WRONLY | os.O_CREAT)
    for batch in pooled(len(images)):
        view = memoryview(batch).cast("B")
        while view:
            view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)
    os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on which disk to write")
    args = parser.parse_args()
    images = digests(rows_of(args.gigabytes) // BATCH * BATCH)
    speeds: dict[str, list[float]] = {"plain": [], "cache": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        for _ in range(args.rounds):
            for way, write in (("plain", write_plain), ("cache", write_cache)):
                folder = Path(name) / way
                os.sync()
                start = time.perf_counter()
                write(folder, images)
                speeds[way].append(len(images) * SPEC.row_bytes / 1e9 / (time.perf_counter() - start))
                shutil.rmtree(folder)
    print(f"{len(images)} rows, {args.rounds} rounds")
    print_table("GB/s", speeds, {"cache": "plain"})


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
