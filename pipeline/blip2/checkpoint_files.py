"""Reads the JSON files, the weight index and the safetensors headers of a checkpoint."""

import json
import struct
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pipeline.common.errors import PipelineError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SMALL_FILES = ("*.json", "*.txt")
"""Patterns of the config, tokenizer, image processor and index files."""

_LFS_POINTER = b"version https://git-lfs"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        PipelineError: the file is missing or is not a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PipelineError(f"{path}: no such file; a checkpoint is a folder in Hugging Face format") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PipelineError(f"{path}: not readable as JSON ({error}); download the checkpoint again") from None
    if not isinstance(values, dict):
        raise PipelineError(f"{path}: not a JSON object; download the checkpoint again")
    return values


def weight_files(folder: Path) -> dict[str, Path]:
    """Return the file that holds each tensor, by tensor name. Files are looked up in the order of `from_pretrained`.

    Raises:
        PipelineError: there is neither a weight file nor an index, or it cannot be read.
    """
    if (folder / WEIGHTS).exists():
        return dict.fromkeys(safetensors_header(folder / WEIGHTS)[1], folder / WEIGHTS)
    if not (folder / INDEX).exists():
        raise PipelineError(f"{folder}: neither {WEIGHTS} nor {INDEX} found; only safetensors is supported")
    return {name: folder / shard for name, shard in _weight_map(folder / INDEX).items()}


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise PipelineError(f"{index}: weight_map is not a JSON object; download the checkpoint again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or Path(shard).name != shard:
            raise PipelineError(f"{index}: weight_map has {name} in {shard!r}, which is not a file of this folder")
    return weight_map


def safetensors_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return the offset of the data in a safetensors file, and its header.

    The file starts with the length of the header (8 bytes, little-endian) and the header (JSON). See
    https://huggingface.co/docs/safetensors.

    Raises:
        PipelineError: the header does not describe the whole file.
    """
    try:
        with safe_open(path, "np"), path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (OSError, ValueError, struct.error, SafetensorError) as error:
        raise PipelineError(f"{path}: not a readable safetensors file ({_reason(path, error)}); "
                            "download the checkpoint again") from None  # fmt: skip
    header.pop("__metadata__", None)
    return 8 + length, header


def group_into_shards(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Group tensor names, in order, into shards of at most `max_bytes`; a larger tensor gets a shard of its own."""
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, size in sizes.items():
        if shards[-1] and shard_bytes + size > max_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += size
    return shards


def _reason(path: Path, error: Exception) -> str:
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                return "it is a Git LFS pointer, fetch the file with `git lfs pull`"
    return str(error)
