"""The checkpoints that a training resumes from: which are complete, and whether their files are what was written."""

import json
import shutil
from collections.abc import Container
from pathlib import Path

from cache.files import sha256_of, write_atomically
from pipeline.common.errors import PipelineError
from pipeline.common.files import sync_files
from pipeline.common.progress import log_info

COMPLETE_MARKER = "whole"
"""A file of a checkpoint, written last: the SHA-256 of each of the others, JSON."""
DAMAGED = "damaged-"
"""Before the name of a checkpoint that was set aside."""


def mark_complete(folder: Path) -> None:
    """Note what the files of a checkpoint are, once they are on disk. Raises OSError."""
    sync_files(folder)
    digests = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != COMPLETE_MARKER}
    write_atomically(folder / COMPLETE_MARKER, json.dumps(digests, indent=2).encode())


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Those that were written to their end, the newest first."""
    found = [marker.parent for marker in checkpoints.glob(f"checkpoint-*/{COMPLETE_MARKER}")]
    return sorted(found, key=_step, reverse=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a complete checkpoint, in words; None if all its files are what was written."""
    marker = folder / COMPLETE_MARKER
    try:
        content = marker.read_bytes()
        digests: dict[str, str] = json.loads(content) if content else {}  # older versions marked with an empty file
        for name, sha256 in digests.items():
            path = folder / Path(name).name
            if not path.is_file():
                return f"{name} is missing"
            if sha256_of(path) != sha256:
                return f"{name} is not what was written"
    except OSError as error:
        return f"a file cannot be read: {error}"
    except (ValueError, AttributeError, TypeError):
        return f"{marker.name} is not what was written"
    return None


def sound_checkpoint(checkpoints: Path, begin_anew: str) -> Path | None:
    """The newest checkpoint without damage; None if none was written to its end. Newer ones are set aside.

    Raises `PipelineError` if all are damaged: it says how to `begin_anew`.
    """
    found = complete_checkpoints(checkpoints)
    damages: dict[Path, str] = {}
    for folder in found:
        problem = damage(folder)
        if problem is None:
            for damaged, what in damages.items():
                aside = _set_aside(damaged)
                log_info(f"{damaged}: damaged, {what}; resuming from {folder.name} instead. It is kept as {aside.name}")
            return folder
        damages[folder] = problem
    if damages:
        told = "; ".join(f"{folder.name}: {problem}" for folder, problem in damages.items())
        raise PipelineError(
            f"{checkpoints}: no checkpoint is left to resume from ({told}). To train from the first step again: "
            f"{begin_anew}; or delete {checkpoints} and resume"
        )
    return None


def remove_old(checkpoints: Path, keep: int) -> None:
    """Remove all complete checkpoints but the newest `keep`."""
    for folder in complete_checkpoints(checkpoints)[keep:]:
        shutil.rmtree(folder, ignore_errors=True)


def remove_incomplete(checkpoints: Path, before: Container[Path] = ()) -> None:
    """Remove what a save that failed has left, but nothing that was there `before`."""
    for folder in checkpoints.glob("checkpoint-*"):
        if folder not in before and not (folder / COMPLETE_MARKER).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    aside = folder.with_name(DAMAGED + folder.name)
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def _step(folder: Path) -> int:
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1
