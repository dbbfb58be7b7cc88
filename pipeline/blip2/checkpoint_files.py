"""What the files of a checkpoint's folder say of themselves: JSON, the names of the tensors, safetensors headers."""

import json
import struct
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pipeline.common.errors import PipelineError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SMALL_FILES = ("*.json", "*.txt")  # config, tokenizer, image processor, index

_POINTER = b"version https://git-lfs"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `PipelineError`, naming the file, if it is not there or is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PipelineError(f"{path}: not there; a checkpoint is a folder in Hugging Face form") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PipelineError(f"{path}: not readable as JSON ({error}); get the checkpoint again") from None
    if not isinstance(values, dict):
        raise PipelineError(f"{path}: not a JSON object; get the checkpoint again")
    return values


def weight_files(folder: Path) -> dict[str, Path]:
    """Name of each tensor -> the file that holds it, in the order that `from_pretrained` looks for the files.

    Raises `PipelineError` if there is neither a weight file nor an index, or one of them cannot be read.
    """
    if (folder / WEIGHTS).exists():
        return dict.fromkeys(safetensors_header(folder / WEIGHTS)[1], folder / WEIGHTS)
    if not (folder / INDEX).exists():
        raise PipelineError(f"{folder}: neither {WEIGHTS} nor {INDEX}; only checkpoints in safetensors are loaded")
    return {name: folder / shard for name, shard in _weight_map(folder / INDEX).items()}


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise PipelineError(f"{index}: weight_map is not a JSON object; get the checkpoint again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or Path(shard).name != shard:
            raise PipelineError(f"{index}: weight_map has {name} in {shard!r}, which is no file of this folder")
    return weight_map


def safetensors_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file starts, and its header: a length (8 bytes, little-endian), then JSON.

    Raises `PipelineError` unless the header describes the file to its last byte.
    """
    try:
        with safe_open(path, "np"), path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (OSError, ValueError, struct.error, SafetensorError) as error:
        raise PipelineError(f"{path}: not a readable safetensors file ({_reason(path, error)}); "
                            "get the checkpoint again") from None  # fmt: skip
    header.pop("__metadata__", None)
    return 8 + length, header


def _reason(path: Path, error: Exception) -> str:
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                return "a Git LFS pointer, whose file was not fetched"
    return str(error)
