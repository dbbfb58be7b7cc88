"""Read and resume caches with one mutated file: `python cache_fuzz.py SEED COUNT FOLDER`.

Runs in its own process, because a damaged file might crash HDF5. Prints the outcomes as JSON; fails at the first
mutation that gives a wrong row or any error but CacheError.
"""

import json
import os
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from cache_fakes import build, digests, edit_manifest, features, put, spec, table, texts_of, write_some

from cache.audit import NOT_STORED, verify
from cache.part import PartWriter
from cache.reader import FeatureReader
from cache.repair import drop_damaged
from cache.spec import CacheError
from cache.writer import FeatureWriter

WANTED = digests(5)
MORE = digests(13)
VALUES = [None, True, -1, 0, 1, 3, 2**31, 2**63, 10**40, 0.5, 1e400, "", "x", "../x", "features-00000.h5", [], [1], {}]


# Caches


def make_finished(folder):
    build(folder, WANTED)


def make_unfinished(folder):
    with FeatureWriter(folder, spec(), MORE, 3) as writer:
        write_some(writer, limit=4)
        with PartWriter(writer.parts[2]) as part:
            put(part, 1)
            part.mark_failed(np.array([0]))


def make_extended(folder):
    make_finished(folder)
    make_unfinished(folder)


# Mutations


def edit(data, rng, _):
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        data[rng.randrange(len(data))] = rng.randrange(256)


def flip_bit(data, rng, _):
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def truncate(data, rng, _):
    del data[rng.choice([0, rng.randrange(len(data)), len(data) - 1]) :]


def insert(data, rng, _):
    place = rng.randrange(len(data) + 1)
    data[place:place] = rng.randbytes(rng.choice([1, 2, 8, 512, 4096]))


def remove(data, rng, _):
    start = rng.randrange(len(data))
    del data[start : start + rng.choice([1, 8, 512, 4096])]


def splice(data, rng, other):
    size = rng.choice([4, 16, 64, 512, 4096, len(other)])
    source, target = rng.randrange(len(other)), rng.randrange(len(data))
    data[target : target + size] = other[source : source + size]


def blank(data, rng, _):
    start, size = rng.randrange(len(data)), rng.choice([1, 8, 512, 4096])
    data[start : start + size] = bytes([rng.choice([0, 255])]) * len(data[start : start + size])


def swap(data, _, other):
    data[:] = other


MUTATIONS = [edit, edit, flip_bit, truncate, insert, remove, splice, splice, blank, swap]


def mutate(folder, rng):
    """Mutate one file; return its name and the mutation."""
    files = sorted(path for path in folder.iterdir() if path.stat().st_size)
    path, other = rng.choice(files), rng.choice(files)
    before = path.read_bytes()
    data = bytearray(before)
    change = rng.choice(MUTATIONS)
    if path.suffix == ".h5" and rng.random() < 0.5:  # most of a tiny part is padding
        busy = [start for start in range(0, len(data), 64) if any(data[start : start + 64])]
        start = rng.choice(busy)
        window = data[start : start + 64]
        change(window, rng, other.read_bytes())
        data[start : start + 64] = window
    else:
        change(data, rng, other.read_bytes())
    path.write_bytes(data)
    return None if data == before else (path.name, change.__name__)


def forge(folder, rng):
    """Replace a value in the manifest or the plan and update its checksum; return the file name."""
    name = rng.choice([path.name for path in folder.glob("*.json")])

    def change(content):
        while True:
            key = rng.choice([*content] if isinstance(content, dict) else range(len(content)))
            inside = content[key]
            if not isinstance(inside, dict | list) or not inside or rng.random() < 0.2:
                content[key] = rng.choice(VALUES)
                return
            content = inside

    edit_manifest(folder, change, name)
    return name, "forged"


# Checks


def read(folder, wanted, strict=True):
    """Read everything; rows are correct or raise CacheError; return the number of errors."""
    errors = 0
    try:
        reader = FeatureReader(folder, "memmap" if len(str(folder)) % 2 else "pread")
        stored = dict(reader.stored())
        table_rows = reader.text("train").image_row if "train" in reader.splits else table([]).image_row
        for name in reader.manifest.attachments:
            data = reader.attachment(name).read_bytes()
            assert not strict or data == b'{"reason": "none"}\n'
    except CacheError:
        return 1
    assert not strict or set(stored) <= set(wanted)
    for digest, row in [*stored.items(), *((None, row) for row in set(table_rows.tolist()))]:
        try:
            found = reader.gather([row])
        except CacheError:
            errors += 1
            continue
        if strict and digest:
            np.testing.assert_array_equal(found, features([digest], spec()))
    return errors


def check_finished(folder, strict):
    try:
        found = bool(verify(folder).damage)
    except CacheError:
        found = True
    errors = read(folder, WANTED, strict)
    assert not strict or found, "not found by verify"
    assert not strict or errors, "not noticed"  # every byte of this cache is meaningful
    try:
        drop_damaged(folder, verify(folder).damage)
    except CacheError:
        return "refused"
    read(folder, WANTED, strict)
    left = [damage for damage in verify(folder).damage if damage.file.startswith("features")]
    assert not [damage for damage in left if damage.problem != NOT_STORED], "not repaired"
    return "repaired"


def check_resumed(folder, strict):
    try:
        with FeatureWriter(folder, spec(), MORE, 3) as writer:
            write_some(writer)
            writer.finish(texts_of(writer, MORE))
    except CacheError:
        read(folder, MORE, strict)
        return "refused"
    return "an error later" if read(folder, MORE, strict) else "right"


def main(seed, count, root):
    for name in ("fsync", "fdatasync"):
        setattr(os, name, lambda _: None)
    caches = {make_finished: check_finished, make_unfinished: check_resumed, make_extended: check_resumed}
    for make in caches:
        make(root / make.__name__)
        assert caches[make](shutil.copytree(root / make.__name__, root / f"sound {make.__name__}"), False) != "refused"
    outcomes = Counter()
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        make, check = rng.choice([*caches.items()])
        folder = root / f"{number % 10}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(root / make.__name__, folder)
        forged = rng.random() < 0.1
        what = (forge if forged else mutate)(folder, rng)
        if what is None:
            continue
        try:
            outcomes[f"{make.__name__}: {check(folder, not forged)}"] += 1
        except BaseException as error:
            error.add_note(f"seed {seed}, number {number}, {make.__name__}, {what}")
            raise
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
