"""Names that transformers changed between the releases this project takes: the new ones where they are, else the old.

From 5.24 on the old ones are deprecated: `past_key_values` is `cache`, `gradient_checkpointing*` is
`activation_checkpointing*`.
"""

from dataclasses import fields
from inspect import signature
from typing import Any

from torch import nn
from transformers import TrainingArguments

_KWARGS = {"use_reentrant": False}
_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")


def cache_argument(model: nn.Module) -> str:
    """The name by which `model` takes its keys and values, in `forward` and in `generate`."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def checkpointing_arguments(enabled: bool) -> dict[str, Any]:
    """Of `TrainingArguments`, to have activations computed again instead of kept."""
    known = {field.name for field in fields(TrainingArguments)}
    name = next(name for name in _CHECKPOINTING if name in known)
    return {name: enabled, f"{name}_kwargs": _KWARGS if enabled else None}


def checkpoints_activations(arguments: TrainingArguments) -> bool:
    """Whether `arguments` have them computed again."""
    return bool(next(getattr(arguments, name) for name in _CHECKPOINTING if hasattr(arguments, name)))


def enable_activation_checkpointing(model: nn.Module) -> None:
    """Have `model` compute activations again instead of keeping them."""
    _method(model, "enable")(_KWARGS)


def disable_activation_checkpointing(model: nn.Module) -> None:
    """Have `model` keep activations."""
    _method(model, "disable")()


def _method(model: nn.Module, suffix: str) -> Any:
    return next(getattr(model, f"{name}_{suffix}") for name in _CHECKPOINTING if hasattr(model, f"{name}_{suffix}"))
