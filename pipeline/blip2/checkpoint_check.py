"""Checks a checkpoint against its `config.json` without reading any weights.

Errors are raised before the long work, as one `PipelineError` that names the file and the key or tensor. Without the
check, `from_pretrained` would fill missing tensors with random numbers.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import Blip2Config, Blip2ForConditionalGeneration
from transformers.activations import ACT2FN

from pipeline.blip2.checkpoint_files import CONFIG, INDEX, WEIGHTS, read_json, safetensors_header, weight_files
from pipeline.common.errors import PipelineError
from pipeline.common.library_errors import explain, one_line
from pipeline.common.progress import log_warning

MAX_LISTED = 5
"""Number of problems that an error lists."""
_DTYPES = {"F16", "BF16", "F32", "F64"}  # dtypes of weights, as safetensors names them

# Far above any model. More layers would take hours to instantiate.
_Count = Annotated[int, Field(ge=1, le=1_000_000)]
_Layers = Annotated[int, Field(ge=1, le=1000)]
_Token = Annotated[int, Field(ge=0)]
_Probability = Annotated[float, Field(ge=0, lt=1)]
_Dtype = Literal["float16", "bfloat16", "float32", "float64"]
_Epsilon = Annotated[float, Field(gt=0, lt=1)]


class _Section(BaseModel):
    """Keys of a section that change what is computed. Other keys are allowed."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())

    model_type: str = ""
    dtype: _Dtype | None = None
    torch_dtype: _Dtype | None = None
    return_dict: Literal[True] = True
    chunk_size_feed_forward: Literal[0] = 0


class _Vision(_Section):
    hidden_size: _Count = 1
    intermediate_size: _Count = 1
    num_hidden_layers: _Layers = 1
    num_attention_heads: _Count = 1
    image_size: _Count = 1
    patch_size: _Count = 1
    hidden_act: str = ""
    layer_norm_eps: _Epsilon = 0.1
    attention_dropout: _Probability = 0
    qkv_bias: bool = True


class _QFormer(_Section):
    hidden_size: _Count = 1
    intermediate_size: _Count = 1
    num_hidden_layers: _Layers = 1
    num_attention_heads: _Count = 1
    encoder_hidden_size: _Count = 1
    cross_attention_frequency: _Count = 1
    hidden_act: str = ""
    layer_norm_eps: _Epsilon = 0.1
    hidden_dropout_prob: _Probability = 0
    attention_probs_dropout_prob: _Probability = 0
    use_qformer_text_input: bool = False


class _Text(_Section):
    vocab_size: _Count = 1
    hidden_size: _Count = 1
    ffn_dim: _Count = 1
    num_hidden_layers: _Layers = 1
    num_attention_heads: _Count = 1
    max_position_embeddings: _Count = 1
    word_embed_proj_dim: _Count | None = None
    activation_function: str = ""
    dropout: _Probability = 0
    attention_dropout: _Probability = 0
    layerdrop: _Probability = 0
    do_layer_norm_before: bool = True
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: _Token = 0
    """First token of the prompt."""
    eos_token_id: _Token | Annotated[list[_Token], Field(min_length=1)] = 0
    """End of an answer: any of several ends generation, and the first is the one trained."""
    pad_token_id: _Token | None = None


class _Config(_Section):
    num_query_tokens: _Count = 1
    vision_config: _Vision | None = None
    qformer_config: _QFormer | None = None
    text_config: _Text | None = None
    quantization_config: None = None


def check_config(folder: Path) -> Blip2Config:
    """Return the checkpoint's config.

    Raises:
        PipelineError: the config is not of a supported model, or a value is invalid; names the key.
    """
    path = folder / CONFIG
    values = read_json(path)
    text = values.get("text_config")
    language = text.get("model_type", "opt") if isinstance(text, dict) else "opt"
    if values.get("model_type") != "blip-2" or language != "opt":
        raise PipelineError(
            f"{path} (model.checkpoint): the model is {values.get('model_type')!r} with the language model "
            f"{language!r}; this pipeline supports BLIP-2 with OPT, such as Salesforce/blip2-opt-2.7b"
        )
    try:
        _Config.model_validate(values)
    except ValidationError as error:
        raise _invalid_checkpoint(path, list(explain(error))) from None
    try:
        config = Blip2Config.from_pretrained(folder)
    except Exception as error:  # the exception depends on the release of transformers
        raise _invalid_checkpoint(path, [one_line(error)]) from None
    problems = list(_contradictions(config))
    if problems:
        raise _invalid_checkpoint(path, problems)
    return config


def check_checkpoint(folder: Path, half: tuple[str, ...]) -> None:
    """Check that a checkpoint has the tensors that its config requires. Tensors that the model lacks are logged.

    Args:
        folder: the checkpoint.
        half: name prefixes of the tensors that must be present. The other half may be missing altogether, and its
            files may not be downloaded.

    Raises:
        PipelineError: a tensor or a file is missing, or a tensor has another shape or dtype.
    """
    config = check_config(folder)
    files = weight_files(folder)
    try:
        shapes, tied = model_tensors(config)
    except Exception as error:
        raise _invalid_checkpoint(folder / CONFIG, [f"it does not describe a model: {one_line(error)}"]) from None
    _require_files(folder, {path for name, path in files.items() if name.startswith(half)})
    headers = {path: safetensors_header(path)[1] for path in set(files.values()) if path.exists()}
    has_other_half = any(name in shapes and not name.startswith(half) for name in files)
    expected = {name: shape for name, shape in shapes.items() if has_other_half or name.startswith(half)}
    problems = list(_problems(folder, expected, tied, files, headers))
    if problems:
        raise _invalid_checkpoint(folder, problems)
    unknown = tuple(sorted(files.keys() - shapes.keys()))
    if unknown:
        _log_unknown(folder, unknown)


def end_tokens(config: Blip2Config) -> list[int]:
    """Return the tokens that end an answer; the first is the one trained."""
    tokens: int | list[int] = config.text_config.eos_token_id
    return [tokens] if isinstance(tokens, int) else tokens


def model_tensors(config: Blip2Config) -> tuple[dict[str, torch.Size], dict[str, str]]:
    """Return the shape of each tensor of the full model, and for tied tensors the name of the other one."""
    return _model_tensors(config.to_json_string(use_diff=False))


@cache  # called several times per command
def _model_tensors(config: str) -> tuple[dict[str, torch.Size], dict[str, str]]:
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(Blip2Config.from_dict(json.loads(config)))
    tied = dict(model.all_tied_weights_keys)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}, tied | {b: a for a, b in tied.items()}


def _contradictions(config: Blip2Config) -> Iterator[str]:
    """Yield the values that contradict each other."""
    vision, qformer, text = config.vision_config, config.qformer_config, config.text_config
    for section in ("vision_config", "qformer_config", "text_config"):
        values = getattr(config, section)
        if values.hidden_size % values.num_attention_heads:
            yield (
                f"{section}.num_attention_heads is {values.num_attention_heads}, which is not a divisor of hidden_size "
                f"{values.hidden_size}"
            )
        key = "activation_function" if section == "text_config" else "hidden_act"
        if getattr(values, key) not in ACT2FN:
            yield f"{section}.{key} is {getattr(values, key)!r}, which is unknown to transformers"
    if qformer.encoder_hidden_size != vision.hidden_size:
        yield (
            f"qformer_config.encoder_hidden_size is {qformer.encoder_hidden_size}, but vision_config.hidden_size "
            f"is {vision.hidden_size}"
        )
    for key, tokens in (("bos", [text.bos_token_id]), ("eos", end_tokens(config)), ("pad", [text.pad_token_id or 0])):
        if max(tokens) >= text.vocab_size:
            yield f"text_config.{key}_token_id is {max(tokens)}, but text_config.vocab_size is {text.vocab_size}"


def _require_files(folder: Path, expected: set[Path]) -> None:
    missing = sorted(path.name for path in expected if not path.exists())
    if missing:
        raise PipelineError(f"{folder}: the checkpoint is incomplete: missing {', '.join(missing)}; download it again")


def _problems(
    folder: Path,
    expected: dict[str, torch.Size],
    tied: dict[str, str],
    files: dict[str, Path],
    headers: dict[Path, dict[str, Any]],
) -> Iterator[str]:
    """Yield the tensors that are missing or differ from the config; those in files not downloaded are not checked."""
    missing: set[str] = set()
    listing = WEIGHTS if (folder / WEIGHTS).exists() else INDEX
    for name, shape in expected.items():
        path = files.get(name)
        if path is None:
            other = tied.get(name)
            if other not in files and other not in missing:
                missing.add(name)
                yield f"{listing}: missing {name}"
        elif path not in headers:
            continue
        elif name not in headers[path]:
            yield f"{path.name}: missing {name}, which {INDEX} lists there"
        elif (found := headers[path][name])["shape"] != list(shape):
            yield f"{path.name}: {name} has shape {found['shape']}, but {CONFIG} requires {list(shape)}"
        elif found["dtype"] not in _DTYPES:
            yield f"{path.name}: {name} is {found['dtype']}; supported are {', '.join(sorted(_DTYPES))}"


@cache  # log once
def _log_unknown(folder: Path, names: tuple[str, ...]) -> None:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    log_warning(f"{folder}: ignoring tensors that the model does not have: "
        f"{', '.join(names[:MAX_LISTED])}{more}")  # fmt: skip


def _invalid_checkpoint(path: Path, problems: list[str]) -> PipelineError:
    more = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    listed = "\n  ".join(problems[:MAX_LISTED]) + more
    return PipelineError(
        f"{path}: invalid checkpoint: {listed}\nDownload it again, or set model.checkpoint to another one"
    )
