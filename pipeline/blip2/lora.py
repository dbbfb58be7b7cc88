"""What LoRA adapts and trains: the names in `lora.target_modules` by PEFT's rules, and the biases of `lora.bias`.

PEFT drops a name that matches nothing as long as another one matches, and it takes each name for the full model,
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
"""Every linear layer of the language model's decoder, as PEFT's word of the same name leaves out the output layer."""
DECODER = "language_model.model.decoder."


def resolve_targets(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The `names`, with what `all-linear` stands for, each of which matches linear layers of `model`.

    Raises:
        ConfigError: one of them matches nothing, or what is no linear layer.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names_there = _module_names(model)
    targets: list[str] = []
    for target in names:
        if target == ALL_LINEAR:
            targets += _leaves(name for name in linear if name.startswith(DECODER))
            continue
        matched = set(_matches(target, names_there))
        if not matched or not matched <= set(linear):
            raise ConfigError(_refusal(target, linear, found=bool(matched)))
        targets.append(target)
    return list(dict.fromkeys(targets))


def targets_in_full_model(model: nn.Module, targets: Sequence[str], others: Iterable[str]) -> list[str]:
    """What PEFT must be given to adapt on the full model what `targets` adapt on `model`, which is a part of it.

    These are the targets, but of one that also matches a name of `others`, modules of the other part, the full names.
    """
    others, names = list(others), _module_names(model)
    full = (list(_matches(target, names)) if any(_matches(target, others)) else [target] for target in targets)
    return sorted({name for found in full for name in found})


def compute_with_float_biases(model: nn.Module) -> None:
    """Have every module whose bias is trained add it behind the rest, in whatever dtype that is.

    A trained bias is float32. Layers in half precision take no other dtype than their own, and a 4-bit one would cast
    the bias's own storage.
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
    """Raises `ConfigError` if the installed PEFT would not save all that is trained: some releases forget biases."""
    trained = {name.replace(".default", "") for name, weight in model.named_parameters() if weight.requires_grad}
    forgotten = sorted(trained - get_peft_model_state_dict(model).keys())
    if forgotten:
        raise ConfigError(
            f"lora.bias: the installed release of peft does not save {len(forgotten)} of the trained weights, such as "
            f"{forgotten[0]}; install 0.21 or newer, or set lora.bias=none or lora.bias=all"
        )


def _module_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name]  # the model itself has none


def _matches(target: str, names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if name == target or name.endswith(f".{target}"))


def _leaves(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _refusal(target: str, linear: Sequence[str], found: bool) -> str:
    known = [*_leaves(linear), ALL_LINEAR]
    near = get_close_matches(target, known, n=1)
    wrong = "is no linear layer" if found else "matches nothing"
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"lora.target_modules: {target!r} {wrong} in the language model{hint} There are {', '.join(known)}"
