"""Whether a checkpoint is what its `config.json` says, found out from the config and the headers of the weight files.

No weight is read. What is wrong is raised before the long work, as one `PipelineError` that names file and key or
tensor: loading would fill a missing tensor with random numbers.
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
from pipeline.common.progress import log_info

LISTED = 5
"""Faults that an error lists, at most."""
_DTYPES = {"F16", "BF16", "F32", "F64"}  # of weights, in safetensors' words

# Far above any model; more layers would take hours to lay out.
_Count = Annotated[int, Field(ge=1, le=1_000_000)]
_Layers = Annotated[int, Field(ge=1, le=1000)]
_Token = Annotated[int, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, lt=1)]
_Dtype = Literal["float16", "bfloat16", "float32", "float64"]
_Small = Annotated[float, Field(gt=0, lt=1)]


class _Section(BaseModel):
    """Keys that decide what is computed; others may stand beside them. Defaults are transformers' own."""

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
    layer_norm_eps: _Small = 0.1
    attention_dropout: _Share = 0
    qkv_bias: bool = True


class _QFormer(_Section):
    hidden_size: _Count = 1
    intermediate_size: _Count = 1
    num_hidden_layers: _Layers = 1
    num_attention_heads: _Count = 1
    encoder_hidden_size: _Count = 1
    cross_attention_frequency: _Count = 1
    hidden_act: str = ""
    layer_norm_eps: _Small = 0.1
    hidden_dropout_prob: _Share = 0
    attention_probs_dropout_prob: _Share = 0
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
    dropout: _Share = 0
    attention_dropout: _Share = 0
    layerdrop: _Share = 0
    do_layer_norm_before: bool = True
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: _Token = 0
    """The prompt begins with it."""
    eos_token_id: _Token | Annotated[list[_Token], Field(min_length=1)] = 0
    """The answer ends with it, with the first of several; any of them ends what is generated."""
    pad_token_id: _Token | None = None


class _Config(_Section):
    num_query_tokens: _Count = 1
    vision_config: _Vision | None = None
    qformer_config: _QFormer | None = None
    text_config: _Text | None = None
    quantization_config: None = None


def check_config(folder: Path) -> Blip2Config:
    """The checkpoint's config. Raises `PipelineError`, naming the key, for one that no model can be made of."""
    path = folder / CONFIG
    values = read_json(path)
    text = values.get("text_config")
    language = text.get("model_type", "opt") if isinstance(text, dict) else "opt"
    if values.get("model_type") != "blip-2" or language != "opt":
        raise PipelineError(
            f"{path} (model.checkpoint): the model is {values.get('model_type')!r} with the language model "
            f"{language!r}; this pipeline takes BLIP-2 with OPT, such as Salesforce/blip2-opt-2.7b"
        )
    try:
        _Config.model_validate(values)
    except ValidationError as error:
        raise _refusal(path, list(explain(error))) from None
    try:
        config = Blip2Config.from_pretrained(folder)
    except Exception as error:  # each release of the library checks in its own way
        raise _refusal(path, [one_line(error)]) from None
    faults = list(_contradictions(config))
    if faults:
        raise _refusal(path, faults)
    return config


def check_checkpoint(folder: Path, half: tuple[str, ...]) -> None:
    """Raises `PipelineError` unless the tensors of the checkpoint in `folder` are those that its config asks for.

    The names that start with one of `half` must all be there. The others may be missing, but only all of them; files
    of theirs may be elsewhere. Tensors that the model does not have are logged.
    """
    config = check_config(folder)
    files = weight_files(folder)
    try:
        shapes, tied = model_tensors(config)
    except Exception as error:
        raise _refusal(folder / CONFIG, [f"no model can be made of it: {one_line(error)}"]) from None
    _require_files(folder, {path for name, path in files.items() if name.startswith(half)})
    headers = {path: safetensors_header(path)[1] for path in set(files.values()) if path.exists()}
    with_others = any(name in shapes and not name.startswith(half) for name in files)
    wanted = {name: shape for name, shape in shapes.items() if with_others or name.startswith(half)}
    faults = list(_faults(folder, wanted, tied, files, headers))
    if faults:
        raise _refusal(folder, faults)
    unknown = tuple(sorted(files.keys() - shapes.keys()))
    if unknown:
        _log_unknown(folder, unknown)


def end_tokens(config: Blip2Config) -> list[int]:
    """Any of which ends an answer; the first is the one that training teaches."""
    tokens: int | list[int] = config.text_config.eos_token_id
    return [tokens] if isinstance(tokens, int) else tokens


def model_tensors(config: Blip2Config) -> tuple[dict[str, torch.Size], dict[str, str]]:
    """Name -> shape of each tensor of the full model, and of the tied ones each name -> the name of its twin."""
    return _model_tensors(config.to_json_string(use_diff=False))


@cache  # a stage asks several times
def _model_tensors(config: str) -> tuple[dict[str, torch.Size], dict[str, str]]:
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(Blip2Config.from_dict(json.loads(config)))
    tied = dict(model.all_tied_weights_keys)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}, tied | {b: a for a, b in tied.items()}


def _contradictions(config: Blip2Config) -> Iterator[str]:
    """Values that do not go together."""
    vision, qformer, text = config.vision_config, config.qformer_config, config.text_config
    for section in ("vision_config", "qformer_config", "text_config"):
        values = getattr(config, section)
        if values.hidden_size % values.num_attention_heads:
            yield (
                f"{section}.num_attention_heads is {values.num_attention_heads}, which does not divide hidden_size "
                f"{values.hidden_size}"
            )
        key = "activation_function" if section == "text_config" else "hidden_act"
        if getattr(values, key) not in ACT2FN:
            yield f"{section}.{key} is {getattr(values, key)!r}, which transformers does not know"
    if qformer.encoder_hidden_size != vision.hidden_size:
        yield (
            f"qformer_config.encoder_hidden_size is {qformer.encoder_hidden_size}, and vision_config.hidden_size "
            f"{vision.hidden_size}"
        )
    for key, tokens in (("bos", [text.bos_token_id]), ("eos", end_tokens(config)), ("pad", [text.pad_token_id or 0])):
        if max(tokens) >= text.vocab_size:
            yield f"text_config.{key}_token_id is {max(tokens)}, and text_config.vocab_size {text.vocab_size}"


def _require_files(folder: Path, wanted: set[Path]) -> None:
    absent = sorted(path.name for path in wanted if not path.exists())
    if absent:
        raise PipelineError(f"{folder}: the checkpoint is not whole, it lacks {', '.join(absent)}; get it again")


def _faults(
    folder: Path,
    wanted: dict[str, torch.Size],
    tied: dict[str, str],
    files: dict[str, Path],
    headers: dict[Path, dict[str, Any]],
) -> Iterator[str]:
    """Tensors that are missing, or not as the config says; those of files that are elsewhere are taken to be right."""
    lacking: set[str] = set()
    listing = WEIGHTS if (folder / WEIGHTS).exists() else INDEX
    for name, shape in wanted.items():
        path = files.get(name)
        if path is None:
            twin = tied.get(name)
            if twin not in files and twin not in lacking:
                lacking.add(name)
                yield f"{listing} lacks {name}"
        elif path not in headers:
            continue
        elif name not in headers[path]:
            yield f"{path.name} lacks {name}, which {INDEX} has there"
        elif (found := headers[path][name])["shape"] != list(shape):
            yield f"{path.name} has {name} of shape {found['shape']}, {CONFIG} makes it {list(shape)}"
        elif found["dtype"] not in _DTYPES:
            yield f"{path.name} has {name} in {found['dtype']}, and only {', '.join(sorted(_DTYPES))} are loaded"


@cache  # once is enough
def _log_unknown(folder: Path, names: tuple[str, ...]) -> None:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    log_info(f"{folder}: warning: the model has no place for these tensors, they are ignored: "
        f"{', '.join(names[:LISTED])}{more}")  # fmt: skip


def _refusal(path: Path, faults: list[str]) -> PipelineError:
    more = f"\n  and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
    listed = "\n  ".join(faults[:LISTED]) + more
    return PipelineError(
        f"{path}: the checkpoint cannot be used: {listed}\nGet it again, or name another one in model.checkpoint"
    )
