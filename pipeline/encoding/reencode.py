"""Encode random images of a cache again, and compare the features with the stored ones."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cache.reader import FeatureReader
from cache.spec import CacheSpec
from pipeline.blip2.checkpoint import ENCODER_PREFIXES, fetch_checkpoint
from pipeline.blip2.device import pick_device
from pipeline.blip2.encoder import Blip2Encoder, load_encoder
from pipeline.common.progress import log_warning, progress_bar
from pipeline.data.image_sources import ImageSource
from pipeline.encoding.encoder_spec import encoder_spec
from pipeline.encoding.images import ImageError, Preprocessor, image_digest, read_image_bytes
from pipeline.encoding.provenance import check_same_encoder, config_of_cache, images_of_cache

TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""Allowed difference by encoder dtype, relative to the largest value of a row.

Far above the accumulated rounding of all layers, far below the difference of another encoder.
"""


@dataclass(frozen=True)
class ReencodeReport:
    """Result of `reencode`."""

    reencoded: int
    """Images compared."""
    not_compared: int
    """Images that are missing or have changed."""
    largest_difference: float | None
    mismatches: tuple[str, ...]
    """Images whose features differ by more than rounding."""


def reencode(folder: Path, count: int) -> ReencodeReport:
    """Encode `count` random images of the cache in `folder` again.

    Raises:
        PipelineError: the cache was made with another checkpoint or config.
    """
    config, features = config_of_cache(folder), FeatureReader(folder)
    spec = features.spec
    checkpoint = fetch_checkpoint(config.model.checkpoint, config.model.revision, ENCODER_PREFIXES)
    check_same_encoder(folder, encoder_spec(checkpoint, spec.encoder_dtype, spec.dtype))
    images = images_of_cache(features, config)
    rows = random.sample(sorted(images), min(count, len(images)))
    sample = {row: images[row] for row in rows}
    encoder = load_encoder(checkpoint, pick_device(), getattr(torch, spec.encoder_dtype))
    tolerance = TOLERANCE[spec.encoder_dtype] + torch.finfo(getattr(torch, spec.dtype)).eps
    differences, mismatches = [], []
    for row, difference, scale in _differences(features, sample, encoder, Preprocessor(checkpoint)):
        differences.append(difference)
        if not difference <= tolerance * scale:
            mismatches.append(f"{images[row]}: differs by {difference:.3g} from the stored features")
    if mismatches:
        log_warning(f"{folder}: features differ by more than {tolerance:.2g} of a row's maximum, more than rounding")
    return ReencodeReport(
        len(differences), len(rows) - len(differences), max(differences, default=None), tuple(mismatches)
    )


def _differences(
    features: FeatureReader, images: dict[int, ImageSource], encoder: Blip2Encoder, preprocess: Preprocessor
) -> Iterator[tuple[int, float, float]]:
    """Yield row, largest difference and largest stored value of each image that is still the same."""
    digests = {row: digest for digest, row in features.stored() if row in images}
    with progress_bar("encoding", len(images), "images") as bar, torch.inference_mode():
        for row, image in images.items():
            pixel_values = _pixel_values(image, digests[row], preprocess)
            if pixel_values is not None:
                encoded = encoder(torch.from_numpy(pixel_values)[None].to(pick_device())).cpu().float()
                stored = _as_float(features.gather(np.array([row])), features.spec)
                yield row, float((encoded - stored).abs().max()), float(stored.abs().max())
            bar.update()


def _pixel_values(image: ImageSource, digest: bytes, preprocess: Preprocessor) -> np.ndarray | None:
    """Return (3, H, W), or None, with a warning, if the image is missing or has changed."""
    try:
        data = read_image_bytes(image)
        if image_digest(data) == digest:
            return preprocess(data)
        log_warning(f"{image}: has changed since it was encoded; not compared")
    except ImageError as error:
        log_warning(f"{image}: {error}; not compared")
    return None


def _as_float(stored: np.ndarray, spec: CacheSpec) -> torch.Tensor:
    tensor = torch.from_numpy(stored)
    return (tensor.view(torch.bfloat16) if spec.dtype == "bfloat16" else tensor).float()
