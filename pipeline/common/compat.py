"""The only module that uses private or renamed names of libraries.

Each function is tested in tests/common/test_compat.py, so that a release of a library that changes such a name fails
there. Libraries are imported when a function is called: `pipe --help` loads none of them.

Since transformers 5.24, `past_key_values` is `cache` and `gradient_checkpointing*` is `activation_checkpointing*`.
"""

import atexit
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import TrainingArguments

T = TypeVar("T", bound=type)

_CHECKPOINTING_KWARGS = {"use_reentrant": False}
_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
_BITSANDBYTES_CPU_LOGGER = "bitsandbytes.backends.cpu.ops"
_OPTIONAL_KERNEL_WARNING = "Failed to load CPU gemm_4bit_forward from kernels-community"


def cache_argument(model: "nn.Module") -> str:
    """Return the name of the key-value cache argument of `model.forward` and `model.generate`."""
    from inspect import signature

    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def checkpointing_arguments(enabled: bool) -> dict[str, Any]:
    """Return the arguments of `TrainingArguments` that enable or disable activation checkpointing."""
    known = _training_argument_names()
    name = next(name for name in _CHECKPOINTING if name in known)
    return {name: enabled, f"{name}_kwargs": _CHECKPOINTING_KWARGS if enabled else None}


def _training_argument_names() -> set[str]:
    from dataclasses import fields

    from transformers import TrainingArguments

    return {field.name for field in fields(TrainingArguments)}


def checkpoints_activations(arguments: "TrainingArguments") -> bool:
    """Return whether `arguments` enable activation checkpointing."""
    return bool(next(getattr(arguments, name) for name in _CHECKPOINTING if hasattr(arguments, name)))


def enable_activation_checkpointing(model: "nn.Module") -> None:
    """Recompute activations in the backward pass instead of keeping them."""
    _checkpointing_method(model, "enable")(_CHECKPOINTING_KWARGS)


def disable_activation_checkpointing(model: "nn.Module") -> None:
    """Keep activations for the backward pass."""
    _checkpointing_method(model, "disable")()


def _checkpointing_method(model: "nn.Module", suffix: str) -> Any:
    return next(getattr(model, f"{name}_{suffix}") for name in _CHECKPOINTING if hasattr(model, f"{name}_{suffix}"))


def keep_in_float32(*module_names: str) -> Callable[[T], T]:
    """Class decorator: `from_pretrained(dtype=torch.float16)` leaves these modules in float32."""

    def decorate(model_class: T) -> T:
        model_class._keep_in_fp32_modules = module_names  # type: ignore[attr-defined]
        return model_class

    return decorate


def storage_id(tensor: "Tensor") -> int:
    """Return an id of the tensor's storage, which views of one storage share; also for fake tensors."""
    return tensor.untyped_storage()._cdata


def fake_tensor_mode() -> Any:
    """Return a context manager under which tensors have a shape, a dtype and a device but no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def keep_weights_trainable(model: "nn.Module") -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference.

    On CPUs with bfloat16 instructions its first forward pass without gradients replaces the weights by a packed form
    with rounded scales, which cannot be trained.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def silence_optional_kernel_warning() -> None:
    """Hide bitsandbytes' warning that an optional CPU kernel is missing: without it the weights are dequantized."""
    logging.getLogger(_BITSANDBYTES_CPU_LOGGER).addFilter(_is_relevant)


def _is_relevant(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_OPTIONAL_KERNEL_WARNING)


def run_exit_functions() -> None:
    """Run the functions registered with `atexit`, as Python does before it finalizes the interpreter."""
    atexit._run_exitfuncs()
