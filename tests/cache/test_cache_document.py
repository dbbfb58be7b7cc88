"""FORMAT.md matches the files."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
from cache_fakes import build, digests, features, put, spec, texts_of, write_some

import cache.spec
from cache.part import PartWriter
from cache.writer import FeatureWriter

DOCUMENT = (Path(cache.spec.__file__).parent / "FORMAT.md").read_text()
WANTED = digests(8)


def keys_of(value):
    """Return every key of a JSON value, at any depth."""
    if isinstance(value, dict):
        return {*value}.union(*map(keys_of, value.values()))
    return set().union(*map(keys_of, value)) if isinstance(value, list) else set()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_documented_code_reads_every_row(tmp_path, monkeypatch, dtype):
    with FeatureWriter(tmp_path / "caches" / "mine", spec(dtype), WANTED, 3) as writer:
        with PartWriter(writer.parts[1]) as part:
            put(part, 0)
            part.mark_failed(np.array([1]))
        write_some(writer)
        writer.finish(texts_of(writer, WANTED))
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    assert "import cache" not in code
    assert "from cache" not in code
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    stored = [digest for row, digest in enumerate(WANTED) if row != 4]
    assert list(names["images"]) == [digest.hex() for digest in stored]
    np.testing.assert_array_equal(list(names["images"].values()), features(stored, spec(dtype)))
    if dtype == "bfloat16":
        (conversion,) = re.findall(r"`(\(features\.astype.*?)`", DOCUMENT)
        numbers = eval(conversion, {"features": features(stored, spec(dtype))})
        np.testing.assert_allclose(numbers, features(stored, spec("float32")), rtol=2**-7)


def test_document_names_every_key_in_the_files(tmp_path):
    build(tmp_path, WANTED[:3])
    with FeatureWriter(tmp_path, spec(), WANTED):
        owner = json.loads((tmp_path / ".lock").read_bytes())
        checksummed = [json.loads((tmp_path / name).read_bytes()) for name in ("manifest.json", "plan.json")]
        words = keys_of([owner, *checksummed]) - keys_of(checksummed[0]["provenance"]) - {"train"}
        for path in tmp_path.glob("*.h5*"):
            with h5py.File(path, locking=False) as file:
                words |= {*file.attrs, *(name.removesuffix("_offsets") for name in file)}
    assert len(words) > 30
    assert not {word for word in words if f"`{word}`" not in DOCUMENT}


def test_h5dump_reads_a_part(tmp_path):
    program = shutil.which("h5dump")
    if not program:
        pytest.skip("h5dump is not installed")
    build(tmp_path, WANTED)
    done = subprocess.run([program, "-H", tmp_path / "features-00000.h5"], capture_output=True, text=True, check=True)
    for name in ("query_features", "image_digest", "crc32", "encoder_fingerprint"):
        assert f'"{name}"' in done.stdout
