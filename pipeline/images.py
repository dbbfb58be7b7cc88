"""Pictures -> `pixel_values` (B, 3, H, W), exactly as the checkpoint's image processor makes them."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor, stack
from torch.utils.data import DataLoader, Dataset
from transformers import BlipImageProcessorPil

from pipeline.errors import PipelineError


def image_digest(path: Path) -> bytes:
    """SHA-256 of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


class Preprocessor:
    """The checkpoint's resize, rescale and normalise, always by Pillow: other backends resize differently."""

    def __init__(self, checkpoint_folder: Path):
        self.processor = BlipImageProcessorPil.from_pretrained(checkpoint_folder)
        if not {"height", "width"} <= set(dict(self.processor.size)):
            raise PipelineError(f"{checkpoint_folder}: the image processor's size is not a height and a width")

    def __call__(self, path: Path) -> Tensor:
        """(3, H, W) float32. Raises `PipelineError` that names a picture that cannot be decoded."""
        try:
            with Image.open(path) as image:
                pixel_values = self.processor(image, return_tensors="pt")["pixel_values"]
        except Exception as error:  # a broken file raises anything: OSError, SyntaxError, struct.error, ...
            raise PipelineError(f"{path}: not a picture that can be decoded ({error}); replace or remove it") from None
        result: Tensor = pixel_values[0]
        return result

    def identity(self) -> str:
        """All that decides the pixels, as canonical JSON."""
        names = ("size", "resample", "do_resize", "do_rescale", "rescale_factor", "do_normalize", "do_convert_rgb")
        settings = {name: getattr(self.processor, name) for name in (*names, "image_mean", "image_std")}
        settings["resample"] = int(settings["resample"])
        settings["size"] = {side: settings["size"][side] for side in ("height", "width")}
        return json.dumps(settings | {"backend": "pil"}, sort_keys=True)


class _Pictures(Dataset[Tensor | PipelineError]):
    def __init__(self, paths: Sequence[Path], preprocess: Preprocessor):
        self.paths, self.preprocess = paths, preprocess

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | PipelineError:
        try:
            return self.preprocess(self.paths[index])
        except PipelineError as error:
            return error  # a worker's exception would reach the user with its traceback pasted in


def _collate(pictures: list[Tensor | PipelineError]) -> Tensor | PipelineError:
    errors = [picture for picture in pictures if isinstance(picture, PipelineError)]
    return errors[0] if errors else stack([picture for picture in pictures if isinstance(picture, Tensor)])


def load_batches(paths: Sequence[Path], preprocess: Preprocessor, batch_size: int, workers: int) -> Iterator[Tensor]:
    """`pixel_values` of `batch_size` pictures at a time, in order, decoded ahead by `workers` processes."""
    loader = DataLoader(_Pictures(paths, preprocess), batch_size, num_workers=workers, collate_fn=_collate)
    for batch in loader:
        if isinstance(batch, PipelineError):
            raise batch
        yield batch
