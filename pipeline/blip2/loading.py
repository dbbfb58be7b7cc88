"""One half of a checkpoint -> a model, of which nothing was filled in."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from pipeline.blip2.checkpoint import checkpoint_view
from pipeline.blip2.checkpoint_files import CONFIG
from pipeline.common.errors import PipelineError
from pipeline.common.library_errors import one_line

Model = TypeVar("Model", bound=PreTrainedModel)


def load_half(model_class: type[Model], folder: Path, half: tuple[str, ...], **settings: Any) -> Model:
    """Load what `model_class` is of the checkpoint in `folder`, whose weights of `half` it takes.

    Raises:
        PipelineError: a tensor is missing, of another shape, or not finite; or the library takes the config for none
            that it can load. `check_checkpoint`, which reads no weights, finds the first two earlier.
    """
    with checkpoint_view(folder, half) as view, _errors_only():
        try:
            model, found = model_class.from_pretrained(
                view, output_loading_info=True, ignore_mismatched_sizes=True, **settings
            )
        except (ValueError, TypeError, AttributeError, KeyError, ImportError, OSError) as error:
            raise PipelineError(
                f"{folder}: the checkpoint cannot be loaded: {one_line(error)}; see its {CONFIG}"
            ) from error
    filled = [*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])]
    if filled:
        raise PipelineError(
            f"{folder}: the checkpoint does not have, or not in the shape of its config.json: "
            f"{', '.join(sorted(filled))}; get it again"
        )
    return model


def require_finite(model: PreTrainedModel, folder: Path) -> None:
    """Raises `PipelineError`, naming the tensor, if a loaded weight is NaN or too large for its dtype."""
    for name, weight in model.named_parameters():
        if not _numbers(weight).isfinite().all():
            dtype = str(model.dtype).removeprefix("torch.")
            raise PipelineError(f"{folder}: {name} is not finite in {dtype}; get the checkpoint again, or compute in "
                                "float32")  # fmt: skip


def _numbers(weight: Tensor) -> Tensor:
    """The weight itself, of a 4-bit one its scales, which are not finite either then."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    return state.offset if state.nested else state.absmax


@contextmanager
def _errors_only() -> Iterator[None]:
    """Keep the library's own report of what was not found out of ours."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
