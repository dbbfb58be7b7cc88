"""The config: YAML -> checked, typed, frozen. The only home of defaults."""

import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from pipeline.common.errors import ConfigError
from pipeline.common.table_name import TableName, is_local
from pipeline.common.terminal import locale_problem
from pipeline.common.yaml_text import parse_yaml

Precision = Literal["auto", "float32", "bfloat16", "float16"]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
SPLITS = ("train", "val", "test")
_NAMES_OR_PATHS = {"checkpoint", "dataset", "image_dataset"}
"""Keys that take a hub id or a path."""


class Section(BaseModel):
    """A mapping in which every key is known."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _from_home(cls, value: object, info: ValidationInfo) -> object:
        """A path that begins with ~ is one in a home folder, also where no shell replaces it."""
        name = info.field_name or ""
        takes_path = name in _NAMES_OR_PATHS or Path in _members(cls.model_fields[name].annotation)
        if not (takes_path and isinstance(value, str | Path)):
            return value
        if problem := locale_problem(str(value)):
            raise ValueError(problem)
        if not str(value).startswith("~"):
            return value
        try:
            return str(Path(value).expanduser())
        except RuntimeError:
            raise ValueError("~ stands for a home folder that is not known; write the path out") from None


class ModelConfig(Section):
    checkpoint: str = "Salesforce/blip2-opt-2.7b"
    """BLIP-2 with an OPT language model, in safetensors: a hub id, a folder, or `embedded` (the small one inside)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null is its main branch."""


class SplitFiles(Section):
    """Where one split lies; which of the keys a data format needs is said in the README."""

    annotations: Path | None = None
    questions: Path | None = None
    images: Path | None = None
    """Folder of the pictures."""
    dataset: str | None = None
    """A table with its pictures: a hub id, parquet or arrow files (`*` in a name stands for any part), or a folder."""
    subset: str | None = None
    """Of the data set, where it has several (the library's word is config)."""
    dataset_split: str | None = None
    """Its name for the split, also `train[:90%]`; null is the config's, or the only one of local files."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null is its main branch."""
    image_dataset: str | None = None
    """A second table that has the pictures, by id; null is `dataset`."""
    image_subset: str | None = None
    """Of that one."""

    @property
    def tables(self) -> dict[str, TableName]:
        """The tables that are named, by key."""
        if self.dataset is None:
            return {}
        tables = {"dataset": TableName(self.dataset, self.subset, self.dataset_split, self.revision)}
        if self.image_dataset or self.image_subset:
            whole_split = (self.dataset_split or "").partition("[")[0] or None
            revision = None if self.image_dataset else self.revision
            name = self.image_dataset or self.dataset
            tables["image_dataset"] = TableName(name, self.image_subset, whole_split, revision)
        return tables

    def absolute(self) -> "SplitFiles":
        """The same, found from every folder."""
        paths = {name: path.absolute() for name, path in dict(self).items() if isinstance(path, Path)}
        tables = {key: getattr(self, key) for key in ("dataset", "image_dataset")}
        local = {key: str(Path(name).absolute()) for key, name in tables.items() if name and is_local(name)}
        return self.model_copy(update=paths | local)


_FILES = {"annotations", "questions"}


def _prompt_of(data: ValidationInfo) -> str:
    """The prompt that a data format has unless another one is set."""
    return "a photo of" if data.data.get("format") == "coco_captions" else "Question: {question} Answer:"


class DataConfig(Section):
    format: str = "jsonl"
    """The published form that the files are in; the README has a table of them."""
    prompt: str = Field(None, validate_default=True)
    """The same in training and in evaluation; `{question}` is replaced. The default is that of BLIP-2: "Question:
    {question} Answer:", and for coco_captions, which has no questions, "a photo of"."""
    train: SplitFiles | None = None
    val: SplitFiles | None = None
    test: SplitFiles | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _of_the_format(cls, prompt: object, others: ValidationInfo) -> object:
        return _prompt_of(others) if prompt is None else prompt

    @field_validator("prompt")
    @classmethod
    def _names_the_question(cls, prompt: str, others: ValidationInfo) -> str:
        may_lack = "{question}" not in _prompt_of(others)
        asked = prompt.count("{question}")
        if asked > 1 or not (asked or may_lack) or set("{}") & set(prompt.replace("{question}", "")):
            raise ValueError("must contain {question} once and no other brace")
        return prompt

    @model_validator(mode="after")
    def _has_a_split(self) -> "DataConfig":
        if not self.splits:
            raise ValueError(f"needs at least one of {', '.join(SPLITS)}")
        return self

    @model_validator(mode="after")
    def _keys_fit_the_format(self) -> "DataConfig":
        foreign = _FILES if self.format == "hf" else set(SplitFiles.model_fields) - _FILES - {"images"}
        for split, files in self.splits.items():
            given = [key for key, value in files if value is not None and key in foreign]
            if given:
                raise ValueError(f"{split}.{given[0]} is no key of the format {self.format}")
        return self

    @property
    def splits(self) -> dict[str, SplitFiles]:
        """The splits that are named, in the order train, val, test."""
        named = {name: getattr(self, name) for name in SPLITS}
        return {name: files for name, files in named.items() if files is not None}


class CacheConfig(Section):
    dir: Path
    """Folder of the feature cache."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of the stored query features."""
    part_rows: Positive = 1024
    """Pictures a file; also what one of several processes takes at a time."""
    io: Literal["memmap", "pread"] = "memmap"
    """How rows are read; pread is slower and safe on network mounts."""


class PrecomputeConfig(Section):
    batch_size: Positive = 64
    """Pictures."""
    num_workers: Annotated[int, Field(ge=0)] = 2
    """Threads that decode pictures, at least one."""
    dtype: Precision = "auto"
    """Of the encoder; auto is bfloat16 where the device computes in it, else float16 on CUDA and float32 on a CPU."""
    compile: bool = False
    """Compile the encoder with torch.compile, which takes a minute or more. On a CPU it does not pay."""
    thumbnail_size: Annotated[int, Field(ge=0, le=1024)] = 128
    """Pixels of the longer side of a small picture kept beside each one's features, for `pipe report`; 0 keeps none."""
    on_invalid: Literal["error", "skip"] = "error"
    """What to do about questions that cannot be used: no picture, no answer, an id that is there twice, too long."""


class QuantizationConfig(Section):
    """Of the language model's linear layers; everything else stays unquantised."""

    bits: Literal[4] | None = 4
    """null is unquantised."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    compute_dtype: Precision = "auto"
    """As `precompute.dtype`."""


class LoraConfig(Section):
    r: Positive = 16
    alpha: Positive = 32
    dropout: Fraction = 0.05
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = ("q_proj", "v_proj")
    """Names of linear layers of the language model, or ends of their paths; all-linear is all of its decoder."""
    bias: Literal["none", "all", "lora_only"] = "none"

    @field_validator("target_modules", mode="before")
    @classmethod
    def _all_linear_alone(cls, names: object) -> object:
        return (names,) if names == "all-linear" else names


class TrainConfig(Section):
    epochs: Annotated[float, Field(gt=0)] = 3
    max_steps: Positive | None = None
    """Optimizer steps; overrides epochs."""
    batch_size: Positive = 64
    """Questions an optimizer step."""
    micro_batch: Positive | Literal["auto"] = "auto"
    """Questions a forward pass, the rest is gradient accumulation; auto takes as much as fits into memory."""
    answers: Literal["auto", "most_common", "sampled", "all"] = "auto"
    """Of those people gave: the most common one, one sampled anew each epoch in proportion, or all, weighted by it.

    auto is all for captions, else the most common: VQA accuracy rewards what most people say, and it costs least.
    """
    share_prefix: bool = True
    """What the questions on an image have in common, the image first of all, is computed once for all of them."""
    learning_rate: Annotated[float, Field(gt=0)] = 2.0e-4
    lr_scheduler: Literal["linear", "cosine", "constant_with_warmup"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    weight_decay: NotNegative = 0.0
    max_grad_norm: NotNegative = 1.0
    """Gradients are clipped to this norm; 0 does not clip."""
    dropout: Fraction | None = None
    """The language model's own dropout; null keeps the checkpoint's."""
    save_steps: Positive = 500
    """Optimizer steps between checkpoints that a killed run resumes from."""
    save_minutes: Annotated[float, Field(gt=0)] | None = 15
    """The same by the clock, for slow steps; null is by steps alone."""
    save_total_limit: Positive = 2
    """The newest so many."""
    logging_steps: Positive = 10
    report_to: tuple[str, ...] = ()
    """Trackers that transformers' Trainer knows, by name: tensorboard, wandb, mlflow, trackio, ..."""
    lora_monitor_steps: Positive | None = 50
    """Optimizer steps between two looks at the LoRA weights, the last step always one; null is never."""
    gradient_checkpointing: bool = False
    """Computes activations again instead of keeping them: less memory, a third slower."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do about a step whose loss or gradient is not finite; skipped ones are counted."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    output_dir: Path = Path("runs")


class ValidationConfig(Section):
    """Greedy answers to questions of another split while training goes on, counted as `evaluate` says.

    The adapter of the best look is kept.
    """

    steps: Positive | None = None
    """Optimizer steps between two looks, the last step always one; null is never."""
    split: Literal["train", "val", "test"] = "val"
    questions: Positive = 1000
    """At most so many, all those on images chosen at random; the same in every look."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the choice, not of the training: runs are compared on the same questions."""
    patience: Positive | None = None
    """Training ends after so many looks without a better accuracy; null goes on to the end."""

    @model_validator(mode="after")
    def _looks_if_it_has_patience(self) -> "ValidationConfig":
        if self.patience is not None and self.steps is None:
            raise ValueError("patience counts looks, and there are none without steps")
        return self


class EvaluateConfig(Section):
    split: Literal["train", "val", "test"] = "val"
    batch_size: Positive = 64
    """Questions."""
    num_beams: Positive = 1
    """1 is greedy."""
    max_new_tokens: Positive = 10
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    """Before the end token."""
    length_penalty: float = 1.0
    """Of beam search: a summed log-probability is divided by the length to this power; less prefers shorter answers."""
    metric: Literal["official", "lavis", "lmms-eval", "a-okvqa", "exact"] = "official"
    """Whose script to count like, as the README tells; official: VQAv2's, exact: the one right answer or not."""

    @model_validator(mode="after")
    def _ends_after_it_may(self) -> "EvaluateConfig":
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}")
        return self


PRESETS: dict[str, dict[str, float]] = {
    "greedy": {"num_beams": 1, "max_new_tokens": 10, "min_new_tokens": 0},
    "official": {"num_beams": 5, "max_new_tokens": 10, "min_new_tokens": 1, "length_penalty": -1.0},
}
"""Of `evaluate`; official is how the BLIP-2 paper (section 4.2) answers VQAv2."""

_NOT_TRAINED_BY = {"save_steps", "save_minutes", "save_total_limit", "logging_steps", "report_to", "lora_monitor_steps",
                   "output_dir"}  # fmt: skip
TRAINED_BY: Any = {
    "model": True,
    "data": {"prompt"},
    "quantization": True,
    "lora": True,
    "train": set(TrainConfig.model_fields) - _NOT_TRAINED_BY,
    "validation": True,
}
"""The keys that decide what a training on a given cache ends in."""
_LOOKED_BY = {"metric", "max_new_tokens", "min_new_tokens"}  # of `evaluate`, where training is validated


class Config(Section):
    model: ModelConfig = ModelConfig()
    data: DataConfig
    cache: CacheConfig
    precompute: PrecomputeConfig = PrecomputeConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    validation: ValidationConfig = ValidationConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def answers_trained(self) -> Literal["most_common", "sampled", "all"]:
        """`train.answers`, without auto."""
        if self.train.answers != "auto":
            return self.train.answers
        return "all" if self.data.format == "coco_captions" else "most_common"

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def with_absolute_paths(self) -> "Config":
        """The same, with files and folders that are found from every folder."""
        checkpoint = self.model.checkpoint
        if Path(checkpoint).is_dir():
            checkpoint = str(Path(checkpoint).absolute())
        return self.model_copy(
            update={
                "cache": self.cache.model_copy(update={"dir": self.cache.dir.absolute()}),
                "model": self.model.model_copy(update={"checkpoint": checkpoint}),
                "data": self.data.model_copy(
                    update={name: files.absolute() for name, files in self.data.splits.items()}
                ),
            }
        )

    def differences(self, other: "Config") -> list[str]:
        """`key: mine, not other's`, for each key in which the two differ and would train differently."""
        keys_by = TRAINED_BY | ({"evaluate": _LOOKED_BY} if self.validation.steps else {})
        mine, theirs = (dict(flatten(config.model_dump(mode="json", include=keys_by))) for config in (self, other))
        keys = dict.fromkeys([*mine, *theirs])
        return [
            f"{key}: {mine.get(key)!r}, not {theirs.get(key)!r}" for key in keys if mine.get(key) != theirs.get(key)
        ]


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file, with `key.sub=value` overrides laid over it: YAML, or a text as it stands.

    Raises `ConfigError` that names every offending key, and the override or the file that it stands in.
    """
    values = _read_yaml(path)
    for override in overrides:
        _apply(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = (f"{_source(key, path, overrides)}: {line}" for key, line in _explain(error))
        raise ConfigError("\n".join(lines)) from None


def _listed_values(override: str) -> list[str]:
    """The values that `key.sub=a,b,c` lists, none in brackets taken apart; a single one of a key that takes text."""
    key, _, text = override.partition("=")
    types = _types(key.split("."))
    if str in types or Path in types:
        return [text]
    return [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", text)]


def _check_listed(overrides: Sequence[str]) -> None:
    """Of a key given twice the last value holds, but not if one lists several; none of them is listed twice."""
    keys = [override.partition("=")[0] for override in overrides]
    for override in overrides:
        key, values = override.partition("=")[0], _listed_values(override)
        if len(values) > 1 and keys.count(key) > 1:
            raise ConfigError(f"{override!r}: {key} is given twice; list all of its values once")
        if len(set(values)) < len(values):
            raise ConfigError(f"{override!r}: {key} lists a value twice")


def combinations_of(overrides: Sequence[str]) -> tuple[list[dict[str, str]], tuple[str, ...]]:
    """Every combination of the overrides that list several values, and the other overrides."""
    listed = {override.partition("=")[0]: _listed_values(override) for override in overrides}
    _check_listed(overrides)
    varied = {key: values for key, values in listed.items() if len(values) > 1}
    fixed = tuple(override for override in overrides if override.partition("=")[0] not in varied)
    return [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())], fixed


def _source(key: str, path: Path, overrides: Sequence[str]) -> str:
    """The override that the value of `key` comes from, or the file."""
    for override in reversed(overrides):
        if f"{key}.".startswith(f"{override.partition('=')[0]}."):
            return repr(override)
    return str(path)


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`section.key` and its value, of every key."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.is_dir():
        inside = path / "config.yaml"
        hint = f"its config is {inside}" if inside.is_file() else "name a config file"
        raise ConfigError(f"{path}: is a folder; {hint}")
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file; the examples are in configs/, easy_vqa.yaml the smallest")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping of {', '.join(Config.model_fields)}")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.split(".")
    if not equals or not all(names):
        raise ConfigError(f"{override!r} is not an override: write KEY.SUB=VALUE, as in train.epochs=1")
    value = _parse(override, text, _types(names))
    for name in names[:-1]:
        nested = values.setdefault(name, {})
        if nested is None:
            nested = values[name] = {}
        if not isinstance(nested, dict):
            raise ConfigError(f"{override!r}: {name} is a value, not a section")
        values = nested
    values[names[-1]] = value


def _parse(override: str, text: str, types: Sequence[Any]) -> Any:
    """The value of an override: YAML, but for a key that takes text what YAML makes anything else of, as it stands."""
    is_text = str in types or Path in types
    try:
        value = parse_yaml(text, repr(override))
    except (yaml.YAMLError, ValueError, RecursionError):
        if not is_text:
            raise ConfigError(f"{override!r}: the value is not YAML; quote it") from None
        return text
    stays = isinstance(value, str) or (value is None and type(None) in types)
    return value if stays or not is_text else text


def _types(names: Sequence[str]) -> tuple[Any, ...]:
    """What a key may be; nothing if it is unknown."""
    section = _section(names[:-1])
    field = section.model_fields.get(names[-1]) if section else None
    return _members(field.annotation) if field else ()


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _explain(error: ValidationError) -> Iterator[tuple[str, str]]:
    """Each offending key, and what is wrong with it."""
    wrong: dict[tuple[str, str], list[str]] = {}  # a value that may be of several types has a problem with each
    for problem in error.errors(include_url=False):
        names = [str(name) for name in problem["loc"] if not re.match(r"constrained-|literal\[", str(name))]
        key = ".".join(names)
        if problem["type"] == "extra_forbidden":
            known = _known_keys(names[:-1])
            near = difflib.get_close_matches(names[-1], known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
            yield key, f"unknown key {key}; {hint}"
        elif problem["type"] == "missing":
            yield key, f"{key} is missing"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "tuple_type":
                message = f"a list is written [{problem['input']}]"
            found = "" if isinstance(problem["input"], dict) else f" (found {problem['input']!r})"
            wrong.setdefault((key, found), []).append(f"{message[0].lower()}{message[1:]}")
    for (key, found), messages in wrong.items():
        yield key, f"{key}: {', or '.join(messages)}{found}"


def _known_keys(names: Sequence[str]) -> list[str]:
    section = _section(names)
    return list(section.model_fields) if section else []


def _section(names: Sequence[str]) -> type[BaseModel] | None:
    """The section of that name; None if there is none."""
    section: type[BaseModel] = Config
    for name in names:
        field = section.model_fields.get(name)
        members = _members(field.annotation) if field else ()
        inner = [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]
        if not inner:
            return None
        section = inner[0]
    return section
