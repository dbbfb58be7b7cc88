"""Record in a cache what it was made of, and find its config and images again."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cache.manifest import Manifest
from cache.reader import FeatureReader
from cache.spec import CacheSpec
from pipeline.common.errors import PipelineError
from pipeline.config import SPLITS, Config
from pipeline.data.cached_examples import reader_fingerprint
from pipeline.data.image_sources import ImageSource
from pipeline.data.in_memory import is_in_memory
from pipeline.encoding.dataset_scan import DatasetScan, read_split
from pipeline.encoding.encoder_spec import encoder_settings


def build_provenance(config: Config, checkpoint: Path, scan: DatasetScan) -> dict[str, Any]:
    """Return what made the cache: enough to repair it, and to detect later changes of the annotations."""
    included: Any = {"model": True, "data": True, "precompute": True, "cache": {"dtype", "part_rows"}}
    values = config.with_absolute_paths().model_dump(mode="json", include=included)
    for split in in_memory_splits(scan.sources):
        values["data"][split] = None
    return {
        "config": values,
        "encoder": encoder_settings(checkpoint),
        "sources": scan.sources,
        "reader": reader_fingerprint(),
        "skipped": scan.skipped_by_reason,
        "respelled": scan.num_respelled,
        "versions": {name: version(name) for name in ("torch", "transformers", "pillow")},
    }


def in_memory_splits(sources: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return the splits that were passed from Python."""
    return [split for split in SPLITS if is_in_memory(sources, split)]


def sources_of_cache(folder: Path) -> dict[str, dict[str, str]]:
    """Return the manifest's `sources` of the cache in `folder`."""
    sources: dict[str, dict[str, str]] = Manifest.load(folder).provenance.get("sources", {})
    return sources


def config_of_cache(folder: Path) -> Config:
    """Return the config that the cache in `folder` was made with. Raises `PipelineError` if it has none."""
    values: dict[str, Any] = Manifest.load(folder).provenance.get("config", {})
    try:
        return Config.model_validate({**values, "cache": {**values.get("cache", {}), "dir": folder}})
    except ValueError:
        raise PipelineError(
            f"{folder}: the cache does not contain its config. Run `pipe cache repair CONFIG` with its config"
        ) from None


def check_same_encoder(folder: Path, spec: CacheSpec) -> None:
    """Raise `PipelineError` if the cache in `folder` has another spec."""
    differences = Manifest.load(folder).spec.diff(spec)
    if differences:
        raise PipelineError(
            f"{folder}: was not made with this checkpoint and config. Nothing was changed:\n  "
            + "\n  ".join(differences)
        )


def images_of_cache(features: FeatureReader, config: Config) -> dict[int, ImageSource]:
    """Return the source of the image in every row that a question needs; images that were in memory have none."""
    table_images = {
        (split, example.question_id): example.image
        for split, files in config.data.splits.items()
        if files.tables
        for example in read_split(config.data.format, split, files)[0].examples
    }
    sources = features.manifest.provenance.get("sources", {})
    images: dict[int, ImageSource] = {}
    for split in features.splits:
        text = features.text(split)
        for index, row in enumerate(text.image_row.tolist()):
            record = text.record(index)
            image = table_images.get((split, record["question_id"])) or Path(record["image"])
            if not is_in_memory(sources, split) or Path(record["image"]).is_file():
                images[row] = image
    return images
