"""Opening a cache of 10 million rows in a fresh process: seconds and memory.

    python tests/benchmarks/open_large.py --rows 10000000

The cache is sparse: its digests are random, its features are holes, that is zeros, with the CRCs of zeros. It
takes some 0.7 GB of disk, and is deleted afterwards.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
from common import SPEC

from cache.files import as_bytes, open_descriptor, pwrite_all
from cache.format import create_part, inspect_part, part_name
from cache.manifest import Manifest, PartEntry

PART_ROWS = 1024
OPEN = """
import resource, sys, time
from pathlib import Path

import numpy as np

from cache.reader import FeatureReader


def state(what, since):
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{what:>24} {time.perf_counter() - since:9.3f} s {memory:9.1f} MiB at most so far")


start = time.perf_counter()
state("imported", start)
reader = FeatureReader(Path(sys.argv[1]))
state("opened", start)
rows = np.random.default_rng(0).integers(reader.rows, size=256)
for what in ("256 random rows", "the same again"):
    start = time.perf_counter()
    found = reader.gather(rows)
    state(what, start)
    assert not found.any()
"""


def random_digests(rows: int) -> np.ndarray:
    return np.frombuffer(os.urandom(rows * 32), np.uint8).reshape(rows, 32)


def make_part(path: Path, rows: int) -> tuple[bytes, int]:
    """Laid out by HDF5; -> its head, and where the digests are in it."""
    digests = random_digests(rows)
    create_part(path, SPEC, digests)
    layout = inspect_part(path)
    checksums = np.full(rows, zlib.crc32(bytes(SPEC.row_bytes)), "<i8")
    with open_descriptor(path, os.O_RDWR) as descriptor:
        pwrite_all(descriptor, as_bytes(checksums), layout.crc_offset)
        head = os.pread(descriptor, layout.features_offset, 0)
    return head, head.index(digests.tobytes())


def copy_part(path: Path, rows: int, head: bytes, place: int) -> PartEntry:
    """The same part with other digests."""
    head = head[:place] + random_digests(rows).tobytes() + head[place + rows * 32 :]
    path.write_bytes(head)
    os.truncate(path, len(head) + rows * SPEC.row_bytes)
    return PartEntry(path.name, rows, len(head), hashlib.sha256(head).hexdigest())


def make_sparse(folder: Path, rows: int) -> None:
    sizes = [min(PART_ROWS, rows - start) for start in range(0, rows, PART_ROWS)]
    models = {size: make_part(folder / part_name(0), size) for size in set(sizes)}
    parts = [copy_part(folder / part_name(index), size, *models[size]) for index, size in enumerate(sizes)]
    Manifest(SPEC, PART_ROWS, parts, rows, {}).save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="where to put the cache for the time of the run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, start = Path(name), time.perf_counter()
        make_sparse(folder, args.rows)
        taken = sum(path.stat().st_blocks for path in folder.iterdir()) * 512
        seconds = time.perf_counter() - start
        print(f"{args.rows} rows, {taken / 1e9:.2f} GB on disk, made in {seconds:.0f} s")
        root = str(Path(__file__).parents[2])
        subprocess.run([sys.executable, "-c", OPEN, folder], check=True, env=os.environ | {"PYTHONPATH": root})


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
