"""Find the checkpoints that a training can resume from, and check their files."""

import json
import shutil
from collections.abc import Container
from pathlib import Path

from cache.files import sha256_of
from pipeline.common.errors import PipelineError
from pipeline.common.files import sync_files, write_text
from pipeline.common.progress import log_warning

COMPLETE_MARKER = "complete.json"
"""Written last into a checkpoint: the SHA-256 of each of its other files."""
DAMAGED_PREFIX = "damaged-"
"""Put before the name of a damaged checkpoint, which is kept but never used."""


def mark_complete(folder: Path) -> None:
    """Write the marker of a checkpoint once its files are on disk.

    Raises:
        WriteError: the marker cannot be written.
    """
    sync_files(folder)
    digests = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != COMPLETE_MARKER}
    write_text(folder / COMPLETE_MARKER, json.dumps(digests, indent=2))


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the folders of the complete checkpoints, newest first."""
    found = [marker.parent for marker in checkpoints.glob(f"checkpoint-*/{COMPLETE_MARKER}")]
    return sorted(found, key=_step, reverse=True)


def checkpoint_damage(folder: Path) -> str | None:
    """Return what is wrong with a complete checkpoint, None if every file matches its checksum."""
    try:
        digests: dict[str, str] = json.loads((folder / COMPLETE_MARKER).read_bytes())
        for name, sha256 in digests.items():
            path = folder / Path(name).name
            if not path.is_file():
                return f"{name} is missing"
            if sha256_of(path) != sha256:
                return f"{name} does not match its checksum"
    except OSError as error:
        return f"a file cannot be read: {error}"
    except (ValueError, AttributeError, TypeError):
        return f"{COMPLETE_MARKER} is not valid"
    return None


def newest_valid_checkpoint(checkpoints: Path, restart_command: str) -> Path | None:
    """Return the newest checkpoint that is complete and undamaged; rename newer, damaged ones.

    Args:
        checkpoints: the folder of a run's checkpoints.
        restart_command: the command that trains from the first step, for the error message.

    Returns:
        The folder of the checkpoint, None if no checkpoint is complete.

    Raises:
        PipelineError: all complete checkpoints are damaged.
    """
    damages: dict[Path, str] = {}
    for folder in complete_checkpoints(checkpoints):
        damage = checkpoint_damage(folder)
        if damage is None:
            for damaged, reason in damages.items():
                kept = _rename_damaged(damaged)
                log_warning(f"{damaged}: damaged, {reason}; kept as {kept.name}. Resuming from {folder.name}")
            return folder
        damages[folder] = damage
    if damages:
        reasons = "; ".join(f"{folder.name}: {damage}" for folder, damage in damages.items())
        raise PipelineError(
            f"{checkpoints}: all checkpoints are damaged ({reasons}). To train from the first step: "
            f"{restart_command}; or delete {checkpoints} and resume"
        )
    return None


def remove_old(checkpoints: Path, keep: int) -> None:
    """Remove all complete checkpoints but the newest `keep`."""
    for folder in complete_checkpoints(checkpoints)[keep:]:
        shutil.rmtree(folder, ignore_errors=True)


def remove_incomplete(checkpoints: Path, keep: Container[Path] = ()) -> None:
    """Remove incomplete checkpoints, which a failed save leaves, except those in `keep`."""
    for folder in checkpoints.glob("checkpoint-*"):
        if folder not in keep and not (folder / COMPLETE_MARKER).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _rename_damaged(folder: Path) -> Path:
    target = folder.with_name(DAMAGED_PREFIX + folder.name)
    shutil.rmtree(target, ignore_errors=True)
    return folder.rename(target)


def _step(folder: Path) -> int:
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1
