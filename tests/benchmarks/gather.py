"""Random rows out of a warm cache against `np.take` from RAM, and against other ways of keeping them.

    python tests/benchmarks/gather.py --gigabytes 1 --processes 1 2 4

Every contestant takes its turn in every round; in a turn all processes read for the same seconds, each its own
random rows. The ratio is of medians over the rounds. Every row was read once before, so files are in the page cache
and CRCs are checked. Other ways are measured where their library is installed: `pip install -e .[benchmark]`.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from common import SPEC, batches, make_cache, print_table, rows_of

from cache.reader import FeatureReader

Gather = Callable[[np.ndarray], object]
SHAPE = (SPEC.query_tokens, SPEC.width)


def take(folder: Path, count: int, at_once: int, reuse: bool) -> Gather:
    data = np.concatenate([*batches(count)])
    if not reuse:
        return lambda rows: np.take(data, rows, axis=0)
    out = np.empty((at_once, *SHAPE), data.dtype)
    return lambda rows: np.take(data, rows, axis=0, out=out, mode="clip")  # "raise" would copy once more


def reader(folder: Path, count: int, at_once: int, reuse: bool, io: str = "memmap") -> Gather:
    cache = FeatureReader(folder / "cache", io)
    out = np.empty((at_once, *SHAPE), SPEC.storage_dtype) if reuse else None
    for start in range(0, count, at_once):
        cache.gather(np.arange(start, min(start + at_once, count)))
    return lambda rows: cache.gather(rows, out=out)


def arrow(folder: Path) -> Gather:
    import datasets

    data = datasets.load_from_disk(str(folder / "arrow")).with_format("numpy")
    return lambda rows: data[rows]["features"]


def make_arrow(folder: Path, count: int) -> None:
    import datasets

    def rows():
        return ({"features": row} for batch in batches(count) for row in batch)

    features = datasets.Features({"features": datasets.Array2D(SHAPE, "float16")})
    made = datasets.Dataset.from_generator(rows, features=features, cache_dir=str(folder / "arrow-made"))
    made.save_to_disk(folder / "arrow")


def lmdb(folder: Path) -> Gather:
    import lmdb

    transaction = lmdb.open(str(folder / "lmdb"), readonly=True, lock=False, readahead=False).begin(buffers=True)

    def gather(rows: np.ndarray) -> np.ndarray:
        values = [np.frombuffer(transaction.get(b"%09d" % row), "<f2").reshape(SHAPE) for row in rows.tolist()]
        return np.stack(values)

    return gather


def make_lmdb(folder: Path, count: int) -> None:
    import lmdb

    with lmdb.open(str(folder / "lmdb"), map_size=1 << 40) as environment:
        row = 0
        for batch in batches(count):
            with environment.begin(write=True) as transaction:
                for features in batch:
                    transaction.put(b"%09d" % row, features.tobytes())
                    row += 1


def hdf5(folder: Path) -> Gather:
    import h5py

    file = h5py.File(folder / "images.h5")
    return lambda rows: np.stack([file[f"{row}"][()] for row in rows.tolist()])


def make_hdf5(folder: Path, count: int) -> None:
    import h5py

    with h5py.File(folder / "images.h5", "w") as file:
        for row, features in enumerate(row for batch in batches(count) for row in batch):
            file[f"{row}"] = features


def pt(folder: Path) -> Gather:
    import torch

    torch.set_num_threads(1)
    return lambda rows: torch.stack([torch.load(folder / "pt" / f"{row}.pt") for row in rows.tolist()])


def make_pt(folder: Path, count: int) -> None:
    import torch

    (folder / "pt").mkdir()
    for row, features in enumerate(row for batch in batches(count) for row in batch):
        torch.save(torch.from_numpy(features.copy()), folder / "pt" / f"{row}.pt")


OWN = {
    "np.take": (take, False),
    "gather": (reader, False),
    "np.take, out=": (take, True),
    "gather, out=": (reader, True),
    "gather, out=, pread": (lambda *args: reader(*args, io="pread"), True),
}
OTHERS = {
    "datasets (Arrow)": ("datasets", make_arrow, arrow),
    "LMDB": ("lmdb", make_lmdb, lmdb),
    "HDF5, a data set an image": ("h5py", make_hdf5, hdf5),
    "torch, a .pt file an image": ("torch", make_pt, pt),
}
REFERENCE = dict.fromkeys([*OTHERS, "gather"], "np.take") | {
    "gather, out=": "np.take, out=",
    "gather, out=, pread": "np.take, out=",
}


def contestants(folder: Path, count: int, at_once: int, others: list[str]) -> dict[str, Gather]:
    """In pairs side by side, so that what disturbs one disturbs the other."""
    mine = {name: make(folder, count, at_once, reuse) for name, (make, reuse) in OWN.items()}
    return mine | {name: OTHERS[name][2](folder) for name in others}


def measure(folder, count, at_once, others, rounds, seconds, seed, barrier, results) -> None:
    """In a process of its own: rows read in every turn, by contestant."""
    rng = np.random.default_rng(seed)
    ways = contestants(folder, count, at_once, others)
    for gather in ways.values():
        gather(rng.integers(count, size=at_once))
    read = {name: [] for name in ways}
    for _ in range(rounds):
        for name, gather in ways.items():
            barrier.wait()
            done, start = 0, time.perf_counter()
            while (passed := time.perf_counter() - start) < seconds:
                gather(rng.integers(count, size=at_once))
                done += at_once
            read[name].append(done / passed)
    results.put(read)


def together(processes: int, *args: object) -> dict[str, list[float]]:
    """Rows a second of all processes together, by contestant and round."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    workers = [context.Process(target=measure, args=(*args, seed, barrier, results)) for seed in range(processes)]
    for worker in workers:
        worker.start()
    found = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    return {name: [sum(rates) for rates in zip(*(one[name] for one in found), strict=True)] for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--at-once", type=int, default=256, help="rows a call")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each turn")
    parser.add_argument("--without", nargs="*", default=[], choices=[*OTHERS], help="other ways to leave out")
    parser.add_argument("--folder", type=Path, help="where to put the files for the time of the run")
    args = parser.parse_args()
    count = rows_of(args.gigabytes)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make_cache(folder / "cache", count)
        others = [way for way, (library, *_) in OTHERS.items() if way not in args.without and find_spec(library)]
        for way in others:
            OTHERS[way][1](folder, count)
            print(f"made: {way}", flush=True)
        for processes in args.processes:
            measured = together(processes, folder, count, args.at_once, others, args.rounds, args.seconds)
            print(f"\n{processes} processes, {count} rows, {args.at_once} at once, {args.rounds} rounds")
            print_table("rows a second", measured, REFERENCE)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
