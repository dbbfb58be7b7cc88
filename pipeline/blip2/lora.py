"""Resolves `lora.target_modules` by PEFT's rules and handles the trained biases of `lora.bias`.

PEFT ignores a name that matches nothing as long as another one matches. It also applies the names to the full model,
whose vision model has layers of the same names (`fc1`, `fc2`) that are not trained here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from pipeline.common.errors import ConfigError

ALL_LINEAR = "all-linear"
"""All linear layers of the decoder. Like PEFT's value of the same name, it excludes the output layer."""
DECODER = "language_model.model.decoder."


def resolve_targets(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Expand `all-linear`, and check that each name matches linear layers of `model` only.

    Raises:
        ConfigError: a name matches nothing, or a module that is not a linear layer.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    module_names = _module_names(model)
    targets: list[str] = []
    for target in names:
        if target == ALL_LINEAR:
            targets += _leaves(name for name in linear if name.startswith(DECODER))
            continue
        matched = set(_matches(target, module_names))
        if not matched or not matched <= set(linear):
            raise ConfigError(_unknown_target(target, linear, is_module=bool(matched)))
        targets.append(target)
    return list(dict.fromkeys(targets))


def targets_in_full_model(model: nn.Module, targets: Sequence[str], others: Iterable[str]) -> list[str]:
    """Return the target modules that adapt the same layers on the full model as `targets` on `model`.

    Args:
        model: the language half.
        targets: target modules on `model`.
        others: names of the modules of the encoder half. A target that matches one of them is replaced by the full
            names of the layers that it matches on `model`.
    """
    others, names = list(others), _module_names(model)
    full = (list(_matches(target, names)) if any(_matches(target, others)) else [target] for target in targets)
    return sorted({name for found in full for name in found})


def compute_with_float_biases(model: nn.Module) -> None:
    """Make each module with a trained bias add the bias to its output, in the dtype of the output.

    A trained bias is float32. Layers in half precision accept no other dtype than their own, and a 4-bit layer would
    cast the storage of the bias in place.
    """
    for module in model.modules():
        bias = dict(module.named_parameters(recurse=False)).get("bias")
        if bias is not None and bias.requires_grad:
            module.forward = partial(_add_bias, module, module.forward)


def _add_bias(module: Any, forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    bias = module.bias
    module.bias = None
    try:
        output = forward(*inputs)
    finally:
        module.bias = bias
    biased: Tensor = output + bias.to(output.dtype)
    return biased


def require_all_saved(model: PeftModel) -> None:
    """Check that the installed PEFT saves all trained weights; some releases omit biases.

    Raises:
        ConfigError: it does not.
    """
    trained = {name.replace(".default", "") for name, weight in model.named_parameters() if weight.requires_grad}
    unsaved = sorted(trained - get_peft_model_state_dict(model).keys())
    if unsaved:
        raise ConfigError(
            f"lora.bias: the installed release of peft does not save {len(unsaved)} of the trained weights, such as "
            f"{unsaved[0]}; install 0.21 or newer, or set lora.bias=none or lora.bias=all"
        )


def _module_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name]  # the name of the model itself is empty


def _matches(target: str, names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if name == target or name.endswith(f".{target}"))


def _leaves(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _unknown_target(target: str, linear: Sequence[str], is_module: bool) -> str:
    known = [*_leaves(linear), ALL_LINEAR]
    near = get_close_matches(target, known, n=1)
    problem = "is not a linear layer" if is_module else "matches nothing"
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"lora.target_modules: {target!r} {problem} in the language model{hint} Allowed: {', '.join(known)}"
