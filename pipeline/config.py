"""The config of all stages, and the loading of config files."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from pipeline.common.errors import ConfigError
from pipeline.common.yaml_text import parse_yaml
from pipeline.config_data import SPLITS, DataConfig, SplitFiles
from pipeline.config_sections import (
    CacheConfig,
    EvaluateConfig,
    LoraConfig,
    ModelConfig,
    PrecomputeConfig,
    QuantizationConfig,
    Section,
    TrainConfig,
    ValidationConfig,
)
from pipeline.overrides import apply_override, explain_errors

__all__ = [
    "PRESETS",
    "SPLITS",
    "CacheConfig",
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "LoraConfig",
    "ModelConfig",
    "PrecomputeConfig",
    "QuantizationConfig",
    "SplitFiles",
    "TrainConfig",
    "ValidationConfig",
    "flatten",
    "load_config",
]

PRESETS: dict[str, dict[str, float]] = {
    "greedy": {"num_beams": 1, "max_new_tokens": 10, "min_new_tokens": 0},
    "official": {"num_beams": 5, "max_new_tokens": 10, "min_new_tokens": 1, "length_penalty": -1.0},
}
"""Settings of `evaluate` by preset. official: as the BLIP-2 paper (section 4.2) evaluates VQAv2."""

_TRAIN_KEYS_WITHOUT_EFFECT = {
    "save_steps", "save_minutes", "save_total_limit", "logging_steps", "report_to", "lora_monitor_steps", "output_dir",
}  # fmt: skip
_KEYS_OF_TRAINING: Any = {
    "model": True,
    "data": {"prompt"},
    "quantization": True,
    "lora": True,
    "train": set(TrainConfig.model_fields) - _TRAIN_KEYS_WITHOUT_EFFECT,
    "validation": True,
}
"""Keys that determine the adapter, given the cache."""
_KEYS_OF_VALIDATION = {"evaluate": {"metric", "max_new_tokens", "min_new_tokens"}}


class Config(Section):
    """The config of a run and its cache."""

    model: ModelConfig = ModelConfig()
    """The BLIP-2 checkpoint."""
    data: DataConfig = DataConfig.model_validate({})
    """The dataset, and the prompt."""
    cache: CacheConfig
    """The feature cache."""
    precompute: PrecomputeConfig = PrecomputeConfig()
    """Stage one: encoding of the images."""
    quantization: QuantizationConfig = QuantizationConfig()
    """Quantization of the language model."""
    lora: LoraConfig = LoraConfig()
    """The LoRA adapter."""
    train: TrainConfig = TrainConfig()
    """Stage two: training."""
    validation: ValidationConfig = ValidationConfig()
    """Validation during training."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Predictions and their metric."""

    @property
    def training_answers(self) -> Literal["most_common", "sampled", "all"]:
        """The value of train.answers, with auto resolved."""
        if self.train.answers != "auto":
            return self.train.answers
        return "all" if self.data.format == "coco_captions" else "most_common"

    def to_yaml(self) -> str:
        """Return the config as YAML, all defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def with_absolute_paths(self) -> "Config":
        """Return a copy with absolute paths."""
        checkpoint = self.model.checkpoint
        if Path(checkpoint).is_dir():
            checkpoint = str(Path(checkpoint).absolute())
        splits = {name: files.absolute() for name, files in self.data.splits.items()}
        return self.model_copy(
            update={
                "model": self.model.model_copy(update={"checkpoint": checkpoint}),
                "data": self.data.model_copy(update=splits),
                "cache": self.cache.model_copy(update={"dir": self.cache.dir.absolute()}),
            }
        )

    def differences(self, other: "Config") -> list[str]:
        """Return `key: value, not other's value` for each key that differs and changes the adapter."""
        keys = _KEYS_OF_TRAINING | (_KEYS_OF_VALIDATION if self.validation.steps else {})
        own, others = (dict(flatten(config.model_dump(mode="json", include=keys))) for config in (self, other))
        return [
            f"{key}: {own.get(key)!r}, not {others.get(key)!r}"
            for key in dict.fromkeys([*own, *others])
            if own.get(key) != others.get(key)
        ]


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Load and validate a config.

    Args:
        source: path of a YAML file; or the config as nested dicts.
        overrides: `section.key=value`, applied in order. The value is YAML, or any text for a key that takes text.

    Raises:
        ConfigError: names every invalid key, and the override or file that sets it.
    """
    if isinstance(source, Mapping):
        values, name = deepcopy(dict(source)), "config"
    else:
        values, name = _read_yaml(Path(source)), str(source)
    for override in overrides:
        apply_override(values, override, Config)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain_errors(error, name, overrides, Config)) from None


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `section.key` and value for every key of nested dicts."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file."""
    if path.is_dir():
        inside = path / "config.yaml"
        hint = f"use {inside}" if inside.is_file() else "give a config file"
        raise ConfigError(f"{path}: is a folder; {hint}")
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file; see configs/ for examples, easy_vqa.yaml is the smallest")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping with the keys {', '.join(Config.model_fields)}")
    return values
