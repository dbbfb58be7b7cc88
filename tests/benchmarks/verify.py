"""How fast `cache.audit.verify` reads a cache: out of the page cache, and from the disk.

    python tests/benchmarks/verify.py --gigabytes 1

Beside it, over the same files, plain reading with `os.readv` into one buffer. For a cold round the page cache is asked
to drop the files; where it does not, cold is as warm.
"""

import argparse
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from common import make_cache, print_table, rows_of

from cache.audit import verify


def drop(folder: Path) -> None:
    """Asks the page cache to forget the files."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_plain(folder: Path) -> None:
    buffer = bytearray(8 << 20)
    for path in sorted(folder.iterdir()):
        descriptor = os.open(path, os.O_RDONLY)
        while os.readv(descriptor, [buffer]):
            pass
        os.close(descriptor)


def verify_all(folder: Path) -> None:
    assert verify(folder).damage == []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to put the cache for the time of the run")
    args = parser.parse_args()
    ways = {"plain reading": read_plain, "verify": verify_all}
    temperatures = ["warm", "cold"] if hasattr(os, "posix_fadvise") else ["warm"]
    speeds: dict[str, list[float]] = {f"{way}, {how}": [] for how in temperatures for way in ways}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name) / "cache"
        make_cache(folder, rows_of(args.gigabytes))
        size = sum(path.stat().st_size for path in folder.iterdir())
        for how in temperatures:
            read_plain(folder)
            for _ in range(args.rounds):
                for way, read in ways.items():
                    if how == "cold":
                        drop(folder)
                    start = time.perf_counter()
                    read(folder)
                    speeds[f"{way}, {how}"].append(size / 1e9 / (time.perf_counter() - start))
    print(f"{size / 1e9:.2f} GB, {args.rounds} rounds, {os.cpu_count()} processors")
    print_table("GB/s", speeds, {f"verify, {how}": f"plain reading, {how}" for how in temperatures})


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
