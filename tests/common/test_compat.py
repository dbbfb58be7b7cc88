"""What transformers renamed is followed: by the new names where they are, by the old ones before."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import nn

from pipeline.commands.train import train_run
from pipeline.common import compat
from pipeline.config import Config
from pipeline.runs.run import Run


class _Layers(nn.Module):
    """The methods of a model of either time, of which the deprecated ones must not be called."""

    def __init__(self, *methods: str) -> None:
        super().__init__()
        self.called: list[tuple[str, tuple[Any, ...]]] = []
        for name in methods:
            setattr(self, name, lambda *arguments, name=name: self.called.append((name, arguments)))


class _Before(nn.Module):
    def forward(self, input_ids: object, past_key_values: object = None) -> None: ...


class _Now(nn.Module):
    def forward(self, input_ids: object, cache: object = None) -> None: ...


@dataclass
class _ArgumentsBefore:
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: dict[str, Any] | None = None


@dataclass
class _ArgumentsNow(_ArgumentsBefore):
    activation_checkpointing: bool = False
    activation_checkpointing_kwargs: dict[str, Any] | None = field(default=None)


@pytest.mark.parametrize(("model", "name"), [(_Before(), "past_key_values"), (_Now(), "cache")])
def test_the_cache_goes_by_the_name_that_forward_takes(model: nn.Module, name: str) -> None:
    assert compat.cache_argument(model) == name


@pytest.mark.parametrize(("known", "name"), [(("gradient",), "gradient"), (("gradient", "activation"), "activation")])
def test_checkpointing_is_switched_by_the_newest_name(known: tuple[str, ...], name: str) -> None:
    model = _Layers(*(f"{one}_checkpointing_{what}" for one in known for what in ("enable", "disable")))
    compat.enable_activation_checkpointing(model)
    compat.disable_activation_checkpointing(model)
    assert model.called == [
        (f"{name}_checkpointing_enable", ({"use_reentrant": False},)),
        (f"{name}_checkpointing_disable", ()),
    ]


@pytest.mark.parametrize(("arguments", "name"), [(_ArgumentsBefore, "gradient"), (_ArgumentsNow, "activation")])
def test_the_trainers_arguments_go_by_the_newest_name(
    arguments: type[_ArgumentsBefore], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "TrainingArguments", arguments)
    given = compat.checkpointing_arguments(True)
    assert given == {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
    assert compat.checkpoints_activations(arguments(**given))
    assert not compat.checkpoints_activations(arguments(**compat.checkpointing_arguments(False)))


def test_no_old_name_is_called_in_a_training(cached: Config, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With answers in between and activations that do not fit, which is where the renamed names are used."""
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
    renamed = [str(one.message) for one in caught if "checkpointing" in str(one.message) or "cache" in str(one.message)]
    of_peft = "`is_gradient_checkpointing`"  # which asks every model for it
    assert [line for line in renamed if not line.startswith(of_peft)] == []
