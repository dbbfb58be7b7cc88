"""BLIP-2 checkpoints in Hugging Face format, of which only the files that one half of the model needs are fetched."""

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

ENCODER_PREFIXES = ("vision_model.", "qformer.", "query_tokens")
"""Prefixes of the parameter names of the encoder half."""
LANGUAGE_MODEL_PREFIXES = ("language_projection.", "language_model.")
"""Prefixes of the parameter names of the language half."""


def fetch_checkpoint(checkpoint: str, revision: str | None, half: tuple[str, ...]) -> Path:
    """Return the local folder of a checkpoint that holds at least the weight files of one half.

    Args:
        checkpoint: `embedded`, a folder, or a hub id. From the hub, only the small files and the shards that hold a
            tensor of `half` are downloaded.
        revision: revision on the hub; None for the default branch.
        half: name prefixes of the tensors that are needed.

    Raises:
        PipelineError: the checkpoint cannot be found or downloaded, is not BLIP-2 with OPT in safetensors, or is
            missing a tensor that its config requires.
    """
    _check_checkpoint_name(checkpoint)
    local = Path(public_name(checkpoint))
    folder = local if local.is_dir() else _download(checkpoint, revision, half)
    check_checkpoint(folder, half)
    return folder


def fetch_small_files(checkpoint: str, revision: str | None, half: tuple[str, ...]) -> Path:
    """Return the local folder of a checkpoint with at least its config and tokenizer.

    Raises:
        PipelineError: as `fetch_checkpoint`; for a hub id, only what can be checked without its weight files.
    """
    _check_checkpoint_name(checkpoint)
    if Path(public_name(checkpoint)).is_dir():
        return fetch_checkpoint(checkpoint, revision, half)
    folder = _download(checkpoint, revision)
    check_config(folder)
    return folder


def _check_checkpoint_name(checkpoint: str) -> None:
    """Raise `PipelineError` for a missing folder or a misspelled `embedded` before asking the hub."""
    if checkpoint == EMBEDDED or Path(checkpoint).is_dir():
        return
    if checkpoint.startswith(("/", "./", "../", "~")):
        raise PipelineError(f"{checkpoint} (model.checkpoint): no such folder")
    if get_close_matches(checkpoint.lower(), [EMBEDDED], cutoff=0.7):
        raise PipelineError(f"no checkpoint {checkpoint!r} (model.checkpoint); did you mean {EMBEDDED}?")


def public_name(checkpoint: str) -> str:
    """Return the name by which `from_pretrained` finds the checkpoint: an absolute path or a hub id."""
    if checkpoint == EMBEDDED:
        return str(embedded_checkpoint())
    return str(Path(checkpoint).resolve()) if Path(checkpoint).is_dir() else checkpoint


@contextmanager
def checkpoint_view(folder: Path, half: tuple[str, ...]) -> Iterator[Path]:
    """Provide a folder for `from_pretrained` with the small files of `folder` and the weight files of one half.

    `from_pretrained` opens every shard that the index names. Here the index names the shards of `half` only.
    """
    if (folder / WEIGHTS).exists():
        yield folder  # `from_pretrained` reads only the tensors of the model from a single file
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
                f"cannot write to the folder for temporary files ({error}); free some space there, or set TMPDIR to "
                "another folder"
            ) from error
        yield view


def has_half(folder: Path, half: tuple[str, ...]) -> bool:
    """Return whether the folder has every weight file of one half; a hub download may have the other half only."""
    return all(path.exists() for path in set(_files(folder, half).values()))


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file that holds each tensor of the model, by tensor name."""
    return _files(folder, (*ENCODER_PREFIXES, *LANGUAGE_MODEL_PREFIXES))


def fingerprint(folder: Path, half: tuple[str, ...]) -> str:
    """Return the SHA-256 (hex) over name, dtype, shape and bytes of every tensor of one half, ordered by name.

    Cached until a file changes, because reading the tensors of ViT-g takes seconds.
    """
    files = _files(folder, half)
    state = file_states(sorted(set(files.values())))
    return recall(state) or remember(state, _fingerprint(files))


def _fingerprint(files: dict[str, Path]) -> str:
    headers = {path: safetensors_header(path) for path in set(files.values())}
    digest = hashlib.sha256()
    for name in sorted(files):
        data_start, header = headers[files[name]]
        tensor = header[name]
        digest.update(f"{name} {tensor['dtype']} {tensor['shape']}\n".encode())
        begin, end = tensor["data_offsets"]
        for block in _read_range(files[name], data_start + begin, end - begin):
            digest.update(block)
    return digest.hexdigest()


def _files(folder: Path, half: tuple[str, ...]) -> dict[str, Path]:
    """Return the file that holds each tensor of one half, by tensor name."""
    return {name: path for name, path in weight_files(folder).items() if name.startswith(half)}


def _read_range(path: Path, start: int, length: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while length > 0 and (block := file.read(min(length, 1 << 22))):
            yield block
            length -= len(block)
    if length:
        raise PipelineError(f"{path}: the file is truncated; download the checkpoint again")


@cache  # called several times per command, and each call would contact the hub
def _download(checkpoint: str, revision: str | None, half: tuple[str, ...] | None = None) -> Path:
    """Download the small files and, with `half`, its weight files."""
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
            f"checkpoint {checkpoint!r} (model.checkpoint) is not a local folder, and downloading it from the hub"
            f"{f' at revision {revision!r}' if revision else ''} failed: {reason} Check the name, the network and your "
            "access."
        ) from None
