"""A BLIP-2 checkpoint in Hugging Face form, and of its files only those that one half of the model needs."""

import hashlib
import json
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.embedded import EMBEDDED, embedded_checkpoint
from pipeline.errors import PipelineError
from pipeline.remembered import file_states, recall, remember

# The parameters of the two half-models, by the checkpoint's own names.
ENCODER_HALF = ("vision_model.", "qformer.", "query_tokens")
LANGUAGE_HALF = ("language_projection.", "language_model.")

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SMALL_FILES = ("*.json", "*.txt")  # config, tokenizer, image processor, index


def fetch_checkpoint(checkpoint: str, revision: str | None, half: tuple[str, ...]) -> Path:
    """The local folder of a checkpoint, with at least the weight files that `half` needs in it.

    `checkpoint` is `embedded`, a folder, or a hub id, of which only the small files and the shards that
    hold a tensor of `half` are downloaded. Raises `PipelineError` if it cannot be had or is no BLIP-2
    with a decoder-only language model in safetensors.
    """
    require_plausible(checkpoint)
    local = Path(public_name(checkpoint))
    folder = local if local.is_dir() else _download(checkpoint, revision, half)
    _check(folder, checkpoint, half)
    return folder


def require_plausible(checkpoint: str) -> None:
    """Raises `PipelineError` for what is plainly no checkpoint, before anything is read or downloaded."""
    if checkpoint == EMBEDDED or Path(checkpoint).is_dir():
        return
    if checkpoint.startswith(("/", "./", "../", "~")):
        raise PipelineError(f"{checkpoint} (model.checkpoint): no such folder")
    if get_close_matches(checkpoint.lower(), [EMBEDDED], cutoff=0.7):
        raise PipelineError(f"no checkpoint {checkpoint!r} (model.checkpoint); did you mean {EMBEDDED}?")


def public_name(checkpoint: str) -> str:
    """What plain `from_pretrained` finds the checkpoint by: its folder's absolute path, or its hub id."""
    if checkpoint == EMBEDDED:
        return str(embedded_checkpoint())
    return str(Path(checkpoint).resolve()) if Path(checkpoint).is_dir() else checkpoint


@contextmanager
def only_half(folder: Path, half: tuple[str, ...]) -> Iterator[Path]:
    """A folder for `from_pretrained` that shows the small files of `folder` and the weight files of `half` alone.

    `from_pretrained` opens every shard that an index names; here the index names those of one half.
    """
    if not (folder / INDEX).exists():
        yield folder  # one file: `from_pretrained` reads from it just the tensors that the model has
        return
    index = _read_json(folder / INDEX)
    index["weight_map"] = _weight_map(folder, half)
    with ExitStack() as stack:
        try:
            view = Path(stack.enter_context(TemporaryDirectory(prefix="blip2-half-")))
            for pattern in SMALL_FILES:
                for path in folder.glob(pattern):
                    (view / path.name).symlink_to(path)
            (view / INDEX).unlink()
            (view / INDEX).write_text(json.dumps(index), encoding="utf-8")
            for shard in set(index["weight_map"].values()):
                (view / shard).symlink_to(folder / shard)
        except OSError as error:
            raise PipelineError(
                f"the folder for temporary files cannot be written ({error}); make room there, or set TMPDIR to "
                "another folder"
            ) from error
        yield view


def has_half(folder: Path, half: tuple[str, ...]) -> bool:
    """Whether every weight file of `half` is in the folder; of a hub checkpoint, the other half's may be missing."""
    return all((folder / shard).exists() for shard in set(_weight_map(folder, half).values()))


def tensor_files(folder: Path) -> dict[str, Path]:
    """Name of every tensor of both halves -> the file that holds it."""
    return {name: folder / shard for name, shard in _weight_map(folder, (*ENCODER_HALF, *LANGUAGE_HALF)).items()}


def fingerprint(folder: Path, half: tuple[str, ...]) -> str:
    """SHA-256 (hex) over name, dtype, shape and bytes of every tensor of `half`, in the order of their names.

    Remembered for files that have not changed since: the tensors of ViT-g take seconds to read.
    """
    where = _weight_map(folder, half)
    state = file_states([folder / shard for shard in sorted(set(where.values()))])
    known = recall(state)
    return known or remember(state, _fingerprint(folder, where))


def _fingerprint(folder: Path, where: dict[str, str]) -> str:
    headers = {shard: _safetensors_header(folder / shard) for shard in set(where.values())}
    digest = hashlib.sha256()
    for name in sorted(where):
        data_start, header = headers[where[name]]
        tensor = header[name]
        digest.update(f"{name} {tensor['dtype']} {tensor['shape']}\n".encode())
        begin, end = tensor["data_offsets"]
        _hash_range(digest, folder / where[name], data_start + begin, end - begin)
    return digest.hexdigest()


def _weight_map(folder: Path, half: tuple[str, ...]) -> dict[str, str]:
    """Name of each tensor of `half` -> the file that holds it."""
    if (folder / INDEX).exists():
        names: dict[str, str] = _read_json(folder / INDEX)["weight_map"]
    else:
        names = dict.fromkeys(_safetensors_header(folder / WEIGHTS)[1], WEIGHTS)
    return {name: shard for name, shard in names.items() if name.startswith(half)}


def _safetensors_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file starts, and its header: a length (8 bytes, little-endian), then JSON."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise PipelineError(f"{path}: not a readable safetensors file ({error}); get the checkpoint again") from None
    header.pop("__metadata__", None)
    return 8 + length, header


def _hash_range(digest: "hashlib._Hash", path: Path, start: int, length: int) -> None:
    with path.open("rb") as file:
        file.seek(start)
        while length > 0 and (block := file.read(min(length, 1 << 22))):
            digest.update(block)
            length -= len(block)
    if length:
        raise PipelineError(f"{path}: the file ends before its last tensor; get the checkpoint again")


@cache  # a stage asks several times, each would ask the hub
def _download(checkpoint: str, revision: str | None, half: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(checkpoint, revision=revision, allow_patterns=list(SMALL_FILES)))
        shards = sorted(set(_weight_map(folder, half).values())) if (folder / INDEX).exists() else [WEIGHTS]
        return Path(snapshot_download(checkpoint, revision=revision, allow_patterns=[*SMALL_FILES, *shards]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PipelineError(
            f"checkpoint {checkpoint!r} (model.checkpoint) is neither a folder here nor to be had from the hub"
            f"{f' at revision {revision!r}' if revision else ''}: {reason} Check the name, the network and your access."
        ) from None


def _check(folder: Path, checkpoint: str, half: tuple[str, ...]) -> None:
    config = _read_json(folder / "config.json")
    language = (config.get("text_config") or {}).get("model_type", "opt")
    if config.get("model_type") != "blip-2" or language != "opt":
        raise PipelineError(
            f"checkpoint {checkpoint!r} (model.checkpoint) is {config.get('model_type')!r} with the language model "
            f"{language!r}; this pipeline takes BLIP-2 with OPT, such as Salesforce/blip2-opt-2.7b"
        )
    if not (folder / INDEX).exists() and not (folder / WEIGHTS).exists():
        raise PipelineError(f"{folder}: neither {WEIGHTS} nor {INDEX}; only checkpoints in safetensors are loaded")
    where = _weight_map(folder, half)
    absent = [prefix for prefix in half if not any(name.startswith(prefix) for name in where)]
    absent += sorted({shard for shard in where.values() if not (folder / shard).exists()})
    if absent:
        raise PipelineError(f"{folder}: the checkpoint is not whole, it lacks {', '.join(absent)}; get it again")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PipelineError(f"{path}: not there; a checkpoint is a folder in Hugging Face form") from None
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path}: not readable as JSON ({error}); get the checkpoint again") from None
    if not isinstance(values, dict):
        raise PipelineError(f"{path}: not a JSON object; get the checkpoint again")
    return values
