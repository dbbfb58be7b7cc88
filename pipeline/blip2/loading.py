"""Loads one half of a checkpoint into a model and refuses to fill in missing weights."""

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
    """Load `model_class` from the tensors of the checkpoint in `folder` whose names start with one of `half`.

    Args:
        model_class: the half-model.
        folder: the checkpoint.
        half: name prefixes of its tensors.
        settings: further arguments of `from_pretrained`.

    Raises:
        PipelineError: a tensor is missing or has another shape, or transformers cannot load the config.
            `check_checkpoint`, which reads no weights, finds this earlier.
    """
    with checkpoint_view(folder, half) as view, _errors_only():
        try:
            model, info = model_class.from_pretrained(
                view, output_loading_info=True, ignore_mismatched_sizes=True, **settings
            )
        except (ValueError, TypeError, AttributeError, KeyError, ImportError, OSError) as error:
            raise PipelineError(
                f"{folder}: the checkpoint cannot be loaded: {one_line(error)}; see its {CONFIG}"
            ) from error
    filled = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if filled:
        raise PipelineError(
            f"{folder}: these tensors are missing from the checkpoint, or have another shape than in its {CONFIG}: "
            f"{', '.join(sorted(filled))}; download it again"
        )
    return model


def require_finite(model: PreTrainedModel, folder: Path) -> None:
    """Check that all loaded weights are finite.

    Raises:
        PipelineError: a weight is NaN, or too large for its dtype.
    """
    for name, weight in model.named_parameters():
        if not _values(weight).isfinite().all():
            dtype = str(model.dtype).removeprefix("torch.")
            raise PipelineError(f"{folder}: {name} is not finite in {dtype}; download the checkpoint again, or compute "
                                "in float32")  # fmt: skip


def _values(weight: Tensor) -> Tensor:
    """Return the weight, or the scales of a 4-bit weight, which are not finite if the weight was not."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    return state.offset if state.nested else state.absmax


@contextmanager
def _errors_only() -> Iterator[None]:
    """Silence transformers' loading report: tensors of the other half are unexpected, and missing ones raise."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
