"""A BLIP-2 checkpoint in Hugging Face form, and of its files only those that one half of the model needs."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.blip2.checkpoint_check import check_checkpoint, check_config
from pipeline.blip2.checkpoint_files import INDEX, SMALL_FILES, WEIGHTS, read_json, safetensors_header, weight_files
from pipeline.blip2.embedded import EMBEDDED, embedded_checkpoint
from pipeline.common.errors import PipelineError
from pipeline.common.fingerprint_cache import file_states, recall, remember

# The parameters of the two half-models, by the checkpoint's own names.
ENCODER_PREFIXES = ("vision_model.", "qformer.", "query_tokens")
LANGUAGE_MODEL_PREFIXES = ("language_projection.", "language_model.")


def fetch_checkpoint(checkpoint: str, revision: str | None, half: tuple[str, ...]) -> Path:
    """The local folder of a checkpoint, with at least the weight files that `half` needs in it.

    `checkpoint` is `embedded`, a folder, or a hub id, of which only the small files and the shards that
    hold a tensor of `half` are downloaded. Raises `PipelineError` if it cannot be had, is no BLIP-2
    with a decoder-only language model in safetensors, or lacks a tensor that its config asks for.
    """
    _require_plausible(checkpoint)
    local = Path(public_name(checkpoint))
    folder = local if local.is_dir() else _download(checkpoint, revision, half)
    check_checkpoint(folder, half)
    return folder


def fetch_small_files(checkpoint: str, revision: str | None, half: tuple[str, ...]) -> Path:
    """The local folder of a checkpoint with its config and tokenizer, before anything long is begun.

    Raises `PipelineError` as `fetch_checkpoint` does, of a hub id as far as is known without its weight files.
    """
    _require_plausible(checkpoint)
    if Path(public_name(checkpoint)).is_dir():
        return fetch_checkpoint(checkpoint, revision, half)
    folder = _download(checkpoint, revision)
    check_config(folder)
    return folder


def _require_plausible(checkpoint: str) -> None:
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
def checkpoint_view(folder: Path, half: tuple[str, ...]) -> Iterator[Path]:
    """A folder for `from_pretrained` that shows the small files of `folder` and the weight files of `half` alone.

    `from_pretrained` opens every shard that an index names; here the index names those of one half.
    """
    if (folder / WEIGHTS).exists():
        yield folder  # one file: `from_pretrained` reads from it just the tensors that the model has
        return
    index = read_json(folder / INDEX)
    index["weight_map"] = {name: path.name for name, path in _files(folder, half).items()}
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
    return all(path.exists() for path in set(_files(folder, half).values()))


def tensor_files(folder: Path) -> dict[str, Path]:
    """Name of every tensor of both halves -> the file that holds it."""
    return _files(folder, (*ENCODER_PREFIXES, *LANGUAGE_MODEL_PREFIXES))


def fingerprint(folder: Path, half: tuple[str, ...]) -> str:
    """SHA-256 (hex) over name, dtype, shape and bytes of every tensor of `half`, in the order of their names.

    Remembered for files that have not changed since: the tensors of ViT-g take seconds to read.
    """
    where = _files(folder, half)
    state = file_states(sorted(set(where.values())))
    known = recall(state)
    return known or remember(state, _fingerprint(where))


def _fingerprint(where: dict[str, Path]) -> str:
    headers = {path: safetensors_header(path) for path in set(where.values())}
    digest = hashlib.sha256()
    for name in sorted(where):
        data_start, header = headers[where[name]]
        tensor = header[name]
        digest.update(f"{name} {tensor['dtype']} {tensor['shape']}\n".encode())
        begin, end = tensor["data_offsets"]
        _hash_range(digest, where[name], data_start + begin, end - begin)
    return digest.hexdigest()


def _files(folder: Path, half: tuple[str, ...]) -> dict[str, Path]:
    """Name of each tensor of `half` -> the file that holds it."""
    return {name: path for name, path in weight_files(folder).items() if name.startswith(half)}


def _hash_range(digest: "hashlib._Hash", path: Path, start: int, length: int) -> None:
    with path.open("rb") as file:
        file.seek(start)
        while length > 0 and (block := file.read(min(length, 1 << 22))):
            digest.update(block)
            length -= len(block)
    if length:
        raise PipelineError(f"{path}: the file ends before its last tensor; get the checkpoint again")


@cache  # a stage asks several times, each would ask the hub
def _download(checkpoint: str, revision: str | None, half: tuple[str, ...] | None = None) -> Path:
    """The small files, and the weight files of `half`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(checkpoint, revision=revision, allow_patterns=list(SMALL_FILES)))
        if half is None:
            return folder
        shards = {path.name for path in _files(folder, half).values()} if (folder / INDEX).exists() else {WEIGHTS}
        return Path(snapshot_download(checkpoint, revision=revision, allow_patterns=[*SMALL_FILES, *shards]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PipelineError(
            f"checkpoint {checkpoint!r} (model.checkpoint) is neither a folder here nor to be had from the hub"
            f"{f' at revision {revision!r}' if revision else ''}: {reason} Check the name, the network and your access."
        ) from None
