"""Load and validate the image processor of a checkpoint; errors name the key."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import BlipImageProcessorPil

from pipeline.blip2.checkpoint_files import read_json
from pipeline.common.errors import PipelineError
from pipeline.common.library_errors import explain, one_line

FILES = ("preprocessor_config.json", "processor_config.json")

_Positive = Annotated[float, Field(gt=0)]
_Channels = Annotated[tuple[float, ...], Field(min_length=3, max_length=3)]
_Deviations = Annotated[tuple[_Positive, ...], Field(min_length=3, max_length=3)]


class _Settings(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    do_resize: bool
    do_rescale: bool
    do_normalize: bool
    do_convert_rgb: bool
    size: dict[str, Annotated[int, Field(ge=1)]]
    rescale_factor: _Positive | None
    image_mean: float | _Channels | None
    image_std: _Positive | _Deviations | None

    @model_validator(mode="after")
    def _check_required_values(self) -> Self:
        needed = {"do_rescale": ("rescale_factor",), "do_normalize": ("image_mean", "image_std")}
        for step, keys in needed.items():
            for key in keys:
                if getattr(self, step) and getattr(self, key) is None:
                    raise ValueError(f"{step} is true, but {key} is null")
        return self


def load_image_processor(folder: Path) -> Any:
    """Load the Pillow image processor of the checkpoint in `folder`. Raises `PipelineError` if it is invalid."""
    files = [folder / name for name in FILES if (folder / name).exists()]
    if not files:
        raise PipelineError(f"{folder}: the checkpoint has no image processor ({' or '.join(FILES)})")
    for file in files:
        read_json(file)
    try:
        processor = BlipImageProcessorPil.from_pretrained(folder)
        values = {name: getattr(processor, name) for name in _Settings.model_fields}
        values["size"] = {side: length for side, length in dict(values["size"]).items() if length is not None}
        for name in ("image_mean", "image_std"):
            values[name] = tuple(values[name]) if isinstance(values[name], list) else values[name]
        _Settings.model_validate(values)
    except ValidationError as error:
        raise PipelineError(_invalid_message(files, "; ".join(explain(error)))) from None
    except Exception as error:  # the type depends on the release of the library
        raise PipelineError(_invalid_message(files, one_line(error))) from None
    return processor


def _invalid_message(files: list[Path], reason: str) -> str:
    return f"{' or '.join(map(str, files))}: invalid image processor: {reason}. Download the checkpoint again"
