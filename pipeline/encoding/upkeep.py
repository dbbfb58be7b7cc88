"""Looking after caches: which there are, what is in them, whether they are whole. No model is loaded."""

from pathlib import Path
from typing import Any

from cache import audit
from cache.inventory import CacheFolder, describe, find_caches, remove
from cache.spec import CacheError
from cache.thumbnails import thumbnails_bytes
from pipeline.common.errors import PipelineError
from pipeline.common.progress import log_info, progress_bar
from pipeline.config import load_config


def cache_folder(cache: Path) -> Path:
    """The cache that is meant by its folder, or by a config that names it. Raises `ConfigError`."""
    return load_config(cache).cache.dir if cache.is_file() else cache


def list_caches(root: Path) -> dict[str, Any]:
    """The caches at `root` and below, a line each. Raises `PipelineError` if there is no such folder."""
    if not root.is_dir():
        raise PipelineError(f"{root}: no such folder; name the one that your caches are in")
    return {"caches": [_line(folder) for folder in find_caches(root)]}


def cache_info(folder: Path) -> dict[str, Any]:
    """All that a cache says of itself."""
    found = describe(folder)
    if found.manifest is None:
        return {"cache": str(folder), "state": _state(found), "bytes": found.bytes}
    manifest = found.manifest
    made = manifest.provenance
    return {
        "cache": str(folder),
        "state": _state(found),
        "fingerprint": manifest.fingerprint,
        "images": manifest.rows,
        "bytes": found.bytes,
        "thumbnail_bytes": thumbnails_bytes(folder, manifest),
        "parts": len(manifest.parts),
        "questions": {split: text.questions for split, text in manifest.splits.items()},
        "skipped": made.get("skipped", {}),
        "spec": manifest.spec.to_attributes(),
        "checkpoint": made.get("config", {}).get("model", {}),
        "made_with": made.get("versions", {}),
        "not_in_manifest": found.unlisted,
        "foreign_files": found.other_files,
    }


def verify(folder: Path) -> dict[str, Any]:
    """Reads all of a cache against its checksums.

    Raises `CacheError` if the cache is unfinished or its manifest is damaged.
    """
    manifest = describe(folder).manifest
    with progress_bar("verifying", manifest.part_bytes if manifest else 0, "B", scaled=True) as bar:
        found = audit.verify(folder, bar.update)
    if any(not damage.unreadable and damage.problem != audit.NOT_A_PART for damage in found.damage):
        log_info(f"{folder}: damaged. `pipe cache repair {folder}` encodes again what is lost, and nothing else")
    damaged = [in_words(damage) for damage in found.damage]
    return {"cache": str(folder), "images": found.rows, "bytes": found.bytes, "damaged": damaged}


def remove_cache(folder: Path) -> dict[str, Any]:
    """Deletes a cache, and nothing that is not its own."""
    freed = remove(folder)
    left_alone = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    return {"cache": str(folder), "freed_bytes": freed, "left_alone": left_alone}


def _line(folder: Path) -> dict[str, Any]:
    try:
        found = describe(folder)
    except CacheError:
        return {"cache": str(folder), "state": "damaged manifest"}
    manifest = found.manifest
    line: dict[str, Any] = {"cache": str(folder), "state": _state(found), "bytes": found.bytes}
    if manifest:
        model = manifest.provenance.get("config", {}).get("model", {})
        line |= {"images": manifest.rows, "questions": sum(text.questions for text in manifest.splits.values())}
        line |= {"dtype": manifest.spec.dtype, "checkpoint": str(model.get("checkpoint", ""))}
    return line


def _state(found: CacheFolder) -> str:
    if found.manifest and not found.in_progress:
        return "finished"
    parts = f"{found.sealed} of {found.sealed + found.in_progress} parts are full"
    return f"finished, being extended ({parts})" if found.manifest else f"unfinished ({parts})"


def in_words(damage: audit.Damage) -> str:
    return f"{damage.file}: " + (f"row {damage.row} " if damage.row is not None else "") + damage.problem
