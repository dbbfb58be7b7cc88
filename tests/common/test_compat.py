"""Private and renamed names of libraries still mean what `pipeline.common.compat` expects.

Each test fails if a release of a library changes such a name.
"""

import atexit
import importlib
import inspect
import logging
import subprocess
import sys
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import bitsandbytes.nn.modules
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from pipeline.blip2.encoder import Blip2Encoder, load_encoder
from pipeline.commands.train import train_run
from pipeline.common import compat
from pipeline.config import Config
from pipeline.runs.run import Run

CPU = torch.device("cpu")


class _Layers(nn.Module):
    """Model with the checkpointing methods of an older or a newer release."""

    def __init__(self, *methods: str) -> None:
        super().__init__()
        self.called: list[tuple[str, tuple[Any, ...]]] = []
        for name in methods:
            setattr(self, name, lambda *arguments, name=name: self.called.append((name, arguments)))


class _OlderModel(nn.Module):
    def forward(self, input_ids: object, past_key_values: object = None) -> None: ...


class _NewerModel(nn.Module):
    def forward(self, input_ids: object, cache: object = None) -> None: ...


@dataclass
class _OlderArguments:
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: dict[str, Any] | None = None


@dataclass
class _NewerArguments(_OlderArguments):
    activation_checkpointing: bool = False
    activation_checkpointing_kwargs: dict[str, Any] | None = field(default=None)


@pytest.mark.parametrize(("model", "name"), [(_OlderModel(), "past_key_values"), (_NewerModel(), "cache")])
def test_cache_argument_is_the_name_in_forward(model: nn.Module, name: str) -> None:
    assert compat.cache_argument(model) == name


@pytest.mark.parametrize(("known", "name"), [(("gradient",), "gradient"), (("gradient", "activation"), "activation")])
def test_checkpointing_methods_use_the_newest_name(known: tuple[str, ...], name: str) -> None:
    model = _Layers(*(f"{one}_checkpointing_{what}" for one in known for what in ("enable", "disable")))
    compat.enable_activation_checkpointing(model)
    compat.disable_activation_checkpointing(model)
    assert model.called == [
        (f"{name}_checkpointing_enable", ({"use_reentrant": False},)),
        (f"{name}_checkpointing_disable", ()),
    ]


@pytest.mark.parametrize(("arguments", "name"), [(_OlderArguments, "gradient"), (_NewerArguments, "activation")])
def test_checkpointing_arguments_use_the_newest_name(
    arguments: type[_OlderArguments], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "_training_argument_names", lambda: {field.name for field in fields(arguments)})
    given = compat.checkpointing_arguments(True)
    assert given == {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
    assert compat.checkpoints_activations(arguments(**given))
    assert not compat.checkpoints_activations(arguments(**compat.checkpointing_arguments(False)))


def test_training_uses_no_deprecated_name(cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With validation, and with activations that do not fit, where the renamed names are used."""
    monkeypatch.setattr("pipeline.training.trainer.max_tokens_that_fit", lambda *_: 1)
    settings = cached.train.model_copy(update={"max_steps": 1, "warmup_steps": 0})
    config = cached.model_copy(
        update={"train": settings, "validation": cached.validation.model_copy(update={"steps": 1, "questions": 2})}
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_run(config, Run(tmp_path / "run"))
        explicit = settings.model_copy(update={"gradient_checkpointing": True})
        train_run(config.model_copy(update={"train": explicit}), Run(tmp_path / "other"))
    messages = [str(one.message) for one in caught]
    deprecated = [line for line in messages if "checkpointing" in line or "cache" in line]
    by_peft = "`is_gradient_checkpointing`"
    assert [line for line in deprecated if not line.startswith(by_peft)] == []


def test_keep_in_float32_is_respected_by_from_pretrained(checkpoint: Path) -> None:
    encoder: Blip2Encoder = load_encoder(checkpoint, CPU, torch.float16)
    assert encoder.query_tokens.dtype == torch.float32, "transformers no longer reads _keep_in_fp32_modules"
    assert {weight.dtype for weight in encoder.qformer.parameters()} == {torch.float32}
    assert {weight.dtype for weight in encoder.vision_model.parameters()} == {torch.float16}


def test_storage_id_is_shared_by_views_only() -> None:
    tensor, other = torch.zeros(4, 4), torch.zeros(4, 4)
    assert compat.storage_id(tensor) == compat.storage_id(tensor[1:].t())
    assert compat.storage_id(tensor) != compat.storage_id(other)


def test_fake_tensors_have_shapes_storages_and_no_data() -> None:
    """A terabyte: nothing is allocated."""
    with compat.fake_tensor_mode() as mode:
        tensor = torch.empty(1 << 19, 1 << 19)
        product = tensor.sum(1)
    assert (product.shape, product.device, product.dtype) == ((1 << 19,), CPU, torch.float32)
    assert compat.storage_id(tensor) == compat.storage_id(tensor[1:])
    assert compat.storage_id(tensor) != compat.storage_id(product)
    assert mode.from_tensor(torch.zeros(3)).shape == (3,)


@pytest.mark.parametrize("keep", [True, False])
def test_4_bit_weights_stay_trainable(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that pretends to have bfloat16 instructions."""
    packed: list[object] = []

    def pack(weight: Any, state: Any) -> tuple[Any, Any]:
        packed.append(weight)
        return weight, state

    monkeypatch.setattr(bitsandbytes.nn.modules, "_convert_weight_packed_for_cpu", pack)
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    layer = Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").to(CPU).eval()
    if keep:
        compat.keep_weights_trainable(layer)
    with torch.no_grad():
        layer(torch.zeros(1, 64))
    assert bool(packed) != keep, "bitsandbytes no longer reads support_avx512bf16_for_cpu"


def test_warning_about_the_optional_kernel_is_hidden(caplog: pytest.LogCaptureFixture) -> None:
    source = inspect.getsource(importlib.import_module(compat._BITSANDBYTES_CPU_LOGGER))
    assert compat._OPTIONAL_KERNEL_WARNING in source, "bitsandbytes words its warning differently"
    assert "logging.getLogger(__name__)" in source
    compat.silence_optional_kernel_warning()
    logger = logging.getLogger(compat._BITSANDBYTES_CPU_LOGGER)
    with caplog.at_level(logging.WARNING):
        logger.warning(compat._OPTIONAL_KERNEL_WARNING + ": %s.", "no module named kernels")
        logger.warning("something else")
    assert caplog.messages == ["something else"]


def test_exit_functions_run_once() -> None:
    assert callable(atexit._run_exitfuncs)
    script = "import atexit; from pipeline.common.compat import run_exit_functions as run; atexit.register(print, 1); "
    done = subprocess.run([sys.executable, "-c", script + "run()"], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_compat_imports_no_library_by_itself() -> None:
    script = "import sys, pipeline.common.compat; print({'torch', 'transformers', 'bitsandbytes'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
