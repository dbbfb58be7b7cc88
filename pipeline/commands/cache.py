"""`pipe cache`: list caches, describe, verify and delete one. A model is loaded only to encode images again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache import audit
from cache.inventory import CacheFolder, describe, find_caches, remove
from cache.spec import CacheError
from cache.thumbnails import thumbnails_bytes
from pipeline.common.errors import PipelineError
from pipeline.common.progress import log_warning, progress_bar
from pipeline.common.result import Result
from pipeline.config import load_config


@dataclass(frozen=True)
class CacheListResult(Result):
    """The caches below a folder."""

    caches: list[dict[str, Any]]
    """Per cache: `cache`, `state`, `bytes`, and of a finished one `images`, `questions`, `dtype`, `checkpoint`."""


@dataclass(frozen=True)
class CacheInfoResult(Result):
    """What a cache contains and how it was made. Of an unfinished cache only the first keys are known."""

    cache: str
    state: str
    bytes: int
    fingerprint: str | None = None
    images: int | None = None
    thumbnail_bytes: int | None = None
    parts: int | None = None
    questions: dict[str, int] | None = None
    """By split."""
    skipped: dict[str, int] | None = None
    """Questions by reason."""
    spec: dict[str, Any] | None = None
    checkpoint: dict[str, Any] | None = None
    made_with: dict[str, str] | None = None
    """Versions of libraries."""
    not_in_manifest: list[str] | None = None
    """Files with names of a cache that the manifest does not list."""
    other_files: list[str] | None = None


@dataclass(frozen=True)
class VerifyResult(Result):
    """Result of `verify_cache`."""

    cache: str
    images: int
    bytes: int
    damaged: list[str]
    """Damaged files and rows, or images that were encoded again with another result."""
    reencoded: int | None = None
    not_compared: int | None = None
    """Images that are missing or have changed."""
    largest_difference: float | None = None
    """Between features encoded again and the stored ones."""
    reencode_differs: bool | None = None

    @property
    def exit_status(self) -> int:
        """1 if anything is damaged."""
        return int(bool(self.damaged))


@dataclass(frozen=True)
class RemoveResult(Result):
    """Result of `remove_cache`."""

    cache: str
    freed_bytes: int
    other_files: list[str]
    """Files in the folder that do not belong to the cache, and were kept."""


def cache_folder(cache: Path) -> Path:
    """Return the folder of a cache, given as the folder or as a config that names it. Raises `ConfigError`."""
    return load_config(cache).cache.dir if cache.is_file() else cache


def list_caches(root: Path) -> CacheListResult:
    """List the caches in `root` and its subfolders. Raises `PipelineError` if there is no such folder."""
    if not root.is_dir():
        raise PipelineError(f"{root}: no such folder. Name the folder that contains your caches")
    return CacheListResult([_summary(folder) for folder in find_caches(root)])


def cache_info(cache: Path) -> CacheInfoResult:
    """Describe a cache by its manifest."""
    folder = cache_folder(cache)
    found = describe(folder)
    manifest = found.manifest
    if manifest is None:
        return CacheInfoResult(str(folder), _state(found), found.bytes)
    provenance = manifest.provenance
    return CacheInfoResult(
        cache=str(folder),
        state=_state(found),
        bytes=found.bytes,
        fingerprint=manifest.fingerprint,
        images=manifest.rows,
        thumbnail_bytes=thumbnails_bytes(folder, manifest),
        parts=len(manifest.parts),
        questions={split: text.questions for split, text in manifest.splits.items()},
        skipped=provenance.get("skipped", {}),
        spec=manifest.spec.to_attributes(),
        checkpoint=provenance.get("config", {}).get("model", {}),
        made_with=provenance.get("versions", {}),
        not_in_manifest=found.unlisted,
        other_files=found.other_files,
    )


def verify_cache(cache: Path, reencode: int = 0) -> VerifyResult:
    """Compare a whole cache with its checksums.

    Args:
        cache: folder of the cache, or a config that names it.
        reencode: number of random images to encode again and compare, if nothing is damaged.

    Raises:
        CacheError: the cache is unfinished, or its manifest is damaged.
    """
    folder = cache_folder(cache)
    manifest = describe(folder).manifest
    with progress_bar("verifying", manifest.part_bytes if manifest else 0, "B", scaled=True) as bar:
        found = audit.verify(folder, bar.update)
    if any(not damage.unreadable and damage.problem != audit.NOT_A_PART for damage in found.damage):
        log_warning(f"{folder}: damaged. `pipe cache repair {folder}` encodes only the damaged rows again")
    damaged = [describe_damage(damage) for damage in found.damage]
    if not reencode or damaged:
        return VerifyResult(str(folder), found.rows, found.bytes, damaged)
    from pipeline.encoding.reencode import reencode as encode_again

    report = encode_again(folder, reencode)
    return VerifyResult(
        cache=str(folder),
        images=found.rows,
        bytes=found.bytes,
        damaged=list(report.mismatches),
        reencoded=report.reencoded,
        not_compared=report.not_compared,
        largest_difference=report.largest_difference,
        reencode_differs=bool(report.mismatches),
    )


def remove_cache(cache: Path) -> RemoveResult:
    """Delete a cache, and no other files in its folder."""
    folder = cache_folder(cache)
    freed = remove(folder)
    other_files = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    return RemoveResult(str(folder), freed, other_files)


def describe_damage(damage: audit.Damage) -> str:
    """Return a damaged file or row as one line."""
    return f"{damage.file}: " + (f"row {damage.row} " if damage.row is not None else "") + damage.problem


def _summary(folder: Path) -> dict[str, Any]:
    try:
        found = describe(folder)
    except CacheError:
        return {"cache": str(folder), "state": "damaged manifest"}
    manifest = found.manifest
    summary: dict[str, Any] = {"cache": str(folder), "state": _state(found), "bytes": found.bytes}
    if manifest:
        model = manifest.provenance.get("config", {}).get("model", {})
        summary |= {"images": manifest.rows, "questions": sum(text.questions for text in manifest.splits.values())}
        summary |= {"dtype": manifest.spec.dtype, "checkpoint": str(model.get("checkpoint", ""))}
    return summary


def _state(found: CacheFolder) -> str:
    if found.manifest and not found.in_progress:
        return "finished"
    parts = f"{found.sealed} of {found.sealed + found.in_progress} parts are full"
    return f"finished, being extended ({parts})" if found.manifest else f"unfinished ({parts})"
