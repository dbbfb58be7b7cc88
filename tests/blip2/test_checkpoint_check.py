"""Both stages report an invalid checkpoint with the same error, before the long work."""

import json
import re
import struct
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from data_set import write_config
from safetensors.torch import load_file, save_file

from pipeline.answers.generation import answer_questions
from pipeline.answers.predictor import EncodedImage
from pipeline.batches.sequences import pack
from pipeline.blip2.checkpoint import ENCODER_PREFIXES, LANGUAGE_MODEL_PREFIXES, fetch_checkpoint, fetch_small_files
from pipeline.blip2.checkpoint_files import INDEX, WEIGHTS
from pipeline.blip2.embedded import embedded_checkpoint
from pipeline.blip2.encoder import load_encoder
from pipeline.blip2.language_model import add_lora, load_language_half
from pipeline.cli import main
from pipeline.common.errors import PipelineError
from pipeline.config import EvaluateConfig
from pipeline.data.examples import VQAExample
from pipeline.data.text import PromptTokenizer, tokenize
from pipeline.encoding.encoder_spec import encoder_spec, load_preprocessor

CPU = torch.device("cpu")
HEAD, WORDS = "language_model.lm_head.weight", "language_model.model.decoder.embed_tokens.weight"


def begin_stage_one(folder: Path) -> Any:
    """The steps of `pipe precompute` before images are read."""
    small = fetch_small_files(str(folder), None, ENCODER_PREFIXES)
    PromptTokenizer(small, "Q: {question}")
    return load_preprocessor(small).size


def begin_stage_two(folder: Path) -> Any:
    """The steps of `pipe train` before tokenization and before the model is loaded."""
    folder = fetch_checkpoint(str(folder), None, LANGUAGE_MODEL_PREFIXES)
    return encoder_spec(folder, "float32", "float32"), PromptTokenizer(folder, "Q: {question}")


BEGINNINGS = (begin_stage_one, begin_stage_two)


def compute(folder: Path) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Features, loss and prediction of a question, which show weights that loading would initialize randomly."""
    height, width = begin_stage_one(folder)
    spec, tokenizer = begin_stage_two(folder)
    torch.manual_seed(0)
    features = load_encoder(folder, CPU, torch.float32)(torch.randn(1, 3, height, width))
    text = tokenize([VQAExample(0, Path("x"), "what?", ("red",))], [0], tokenizer)
    asked = EncodedImage(features[0].detach(), text)
    assert len(features[0]) == spec.query_tokens
    model = add_lora(load_language_half(folder, CPU, torch.float32), 4, 8, 0.0, ("q_proj",), "none")
    loss = model.train()(**pack(asked.for_training([0]))).loss.detach()
    found = answer_questions(model.eval(), asked, np.zeros(1, np.int64), tokenizer, EvaluateConfig())
    return features.detach(), loss, found[0].text


def copy_of(folder: Path, **files: Any) -> Path:
    """Links to the embedded checkpoint, with JSON files replaced by stem; None omits a file."""
    folder.mkdir()
    for path in embedded_checkpoint().iterdir():
        if path.stem not in files:
            (folder / path.name).symlink_to(path)
    for stem, values in files.items():
        if values is not None:
            (folder / f"{stem}.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


def with_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], **files: Any) -> Path:
    tensors = dict(_tensors())
    change(tensors)
    copy_of(folder, model=None, **files)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@cache
def _tensors() -> dict[str, torch.Tensor]:
    return load_file(embedded_checkpoint() / WEIGHTS)


@cache
def _config() -> dict[str, Any]:
    return json.loads((embedded_checkpoint() / "config.json").read_text())


def refused(folder: Path) -> str:
    """The error, which is the same in both stages."""
    messages = []
    for begin in BEGINNINGS:
        with pytest.raises(PipelineError) as caught:
            begin(folder)
        messages.append(str(caught.value))
    assert messages[0].partition("(")[0] == messages[1].partition("(")[0]  # of several faults safetensors names any
    return messages[0]


def classes() -> Iterator[str]:
    """One tensor of each kind, from the last layer that has it."""
    names = {re.sub(r"\d+", "N", name): name for name in sorted(_tensors())}
    yield from names.values()


@pytest.mark.parametrize("name", list(classes()))
def test_missing_tensor_or_wrong_shape_is_an_error_with_its_name(name: str, tmp_path: Path) -> None:
    missing = refused(with_tensors(tmp_path / "missing", lambda tensors: tensors.pop(name)))
    assert f"{WEIGHTS}: missing {name}" in missing

    def reshape(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][..., :-1].contiguous()

    found = list(_tensors()[name].shape)
    message = refused(with_tensors(tmp_path / "reshaped", reshape))
    other = [*found[:-1], found[-1] - 1]
    assert f"{WEIGHTS}: {name} has shape {other}, but config.json requires {found}" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool], ids=str)
def test_weights_of_integer_dtype_are_an_error(dtype: torch.dtype, tmp_path: Path) -> None:
    name = "language_model.model.decoder.layers.0.fc1.weight"
    folder = with_tensors(tmp_path / "c", lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    assert re.search(rf"{WEIGHTS}: {name} is \w+; supported are BF16, F16, F32, F64", refused(folder))


@pytest.mark.parametrize("only", [HEAD, WORDS])
def test_one_of_two_tied_weights_is_enough(only: str, tmp_path: Path) -> None:
    def keep_one(tensors: dict[str, torch.Tensor]) -> None:
        tensors[only] = tensors.pop(WORDS)

    _same(compute(with_tensors(tmp_path / "one", keep_one)), compute(embedded_checkpoint()))


def test_both_tied_weights_may_be_present_but_not_neither(tmp_path: Path) -> None:
    both = with_tensors(tmp_path / "both", lambda tensors: tensors.update({HEAD: tensors[WORDS].clone()}))
    _same(compute(both), compute(embedded_checkpoint()))
    untied = {**_config(), "text_config": {**_config()["text_config"], "tie_word_embeddings": False}}
    assert f"missing {HEAD}" in refused(copy_of(tmp_path / "untied", config=untied))
    assert f"missing {WORDS}" in refused(with_tensors(tmp_path / "neither", lambda tensors: tensors.pop(WORDS)))


def test_unknown_tensor_is_logged_and_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Older repositories contain buffers that the model computes itself."""
    name = "vision_model.embeddings.position_ids"
    folder = with_tensors(tmp_path / "more", lambda tensors: tensors.update({name: torch.arange(65)[None]}))
    _same(compute(folder), compute(embedded_checkpoint()))
    logged = capsys.readouterr().err
    assert logged.count(name) == 1
    assert "ignoring tensors that the model does not have" in logged


@pytest.mark.parametrize(("bits", "name"), [(4, "fc1.weight"), (None, "fc1.weight"), (4, "fc1.bias")])
def test_non_finite_tensor_is_an_error_when_loaded(bits: int | None, name: str, tmp_path: Path) -> None:
    name = f"language_model.model.decoder.layers.1.{name}"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for one in (name, "qformer.layernorm.bias"):
            tensors[one] = tensors[one].clone()
            tensors[one].view(-1)[7] = torch.nan

    folder = with_tensors(tmp_path / "nan", spoil)
    with pytest.raises(PipelineError, match=rf"{name} is not finite in float32"):
        load_language_half(folder, CPU, torch.float32, bits)
    with pytest.raises(PipelineError, match=r"qformer\.layernorm\.bias is not finite in float32"):
        load_encoder(folder, CPU, torch.float32)


def test_missing_tensors_are_an_error_when_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without the check of headers, the loading info of transformers is used and not printed."""
    gone = ("qformer.layernorm.bias", "language_model.model.decoder.layers.0.fc1.bias")
    folder = with_tensors(tmp_path / "c", lambda tensors: [tensors.pop(name) for name in gone])
    for load, name in ((load_encoder, gone[0]), (load_language_half, gone[1])):
        with pytest.raises(PipelineError, match=name):
            load(folder, CPU, torch.float32)
    assert "MISSING" not in "".join(capfd.readouterr())


VALUES: tuple[Any, ...] = (None, "7", -1, 0, 1.5, 10**9, [], [2], {}, True)
SECTIONS = ("text_config", "vision_config", "qformer_config")
FREE = {"architectures", "image_text_hidden_size", "image_token_index", "initializer_factor", "initializer_range",
        "transformers_version", "use_decoder_only_language_model"}  # fmt: skip
KEYS = [*((key,) for key in _config() if key not in FREE), *((one, key) for one in SECTIONS for key in _config()[one])]


@pytest.mark.parametrize("key", KEYS, ids=".".join)
def test_invalid_config_value_is_an_error_with_its_key_or_harmless(key: tuple[str, ...], tmp_path: Path) -> None:
    for number, value in enumerate(VALUES):
        config = json.loads(json.dumps(_config()))
        section = config[key[0]] if len(key) > 1 else config
        section[key[-1]] = value
        folder = copy_of(tmp_path / str(number), config=config)
        outcomes = []
        for begin in BEGINNINGS:
            try:
                begin(folder)
                outcomes.append("")
            except PipelineError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]
        by_tensor = "has shape" in outcomes[0] or "missing " in outcomes[0]
        assert not outcomes[0] or by_tensor or key[-1] in outcomes[0] or key[-1] == "model_type"
        assert not outcomes[0] or str(folder) in outcomes[0]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("text_config", "eos_token_id", [202, 2]),
        ("text_config", "pad_token_id", None),
        ("text_config", "word_embed_proj_dim", None),
        ("text_config", "num_hidden_layers", 3),
        ("vision_config", "num_hidden_layers", 3),
        ("qformer_config", "pad_token_id", None),
        ("qformer_config", "vocab_size", -1),
    ],
)
def test_accepted_config_is_deterministic(section: str, key: str, value: Any, tmp_path: Path) -> None:
    config = {**_config(), section: {**_config()[section], key: value}}
    folder = copy_of(tmp_path / "c", config=config)
    _same(compute(folder), compute(folder))


def _same(first: tuple[torch.Tensor, torch.Tensor, str], second: tuple[torch.Tensor, torch.Tensor, str]) -> None:
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert first[2] == second[2]


def test_use_cache_false_in_the_config_changes_no_prediction(tmp_path: Path) -> None:
    """Training with gradient checkpointing saves such a config."""
    probabilities = []
    for number, use_cache in enumerate((True, False)):
        text = {**_config()["text_config"], "use_cache": use_cache}
        folder = copy_of(tmp_path / str(number), config={**_config(), "text_config": text})
        tokenizer = PromptTokenizer(folder, "Question: {question} Answer:")
        table = tokenize([VQAExample(0, Path("a.png"), "what shape is it?", ())], [0], tokenizer)
        asked = EncodedImage(torch.full((16, 128), 0.1), table)
        model = load_language_half(folder, CPU, torch.float32)
        answer = answer_questions(model, asked, np.zeros(1, np.int64), tokenizer, EvaluateConfig())[0]
        probabilities.append((answer.text, answer.log_probability))
    assert probabilities[0] == probabilities[1]


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize(("key", "value"), [("return_dict", False), ("chunk_size_feed_forward", 3)])
def test_unsupported_setting_is_an_error(section: str, key: str, value: Any, tmp_path: Path) -> None:
    config = {**_config(), section: {**_config()[section], key: value}}
    assert f"{section}.{key} is {value}" in refused(copy_of(tmp_path / "c", config=config))


@pytest.mark.parametrize(
    ("key", "value"), [("_attn_implementation", "none"), ("transformers_weights", "other.safetensors")]
)
def test_setting_that_transformers_rejects_is_an_error_with_the_checkpoint(
    key: str, value: str, tmp_path: Path
) -> None:
    folder = copy_of(tmp_path / "c", config={**_config(), key: value})
    with pytest.raises(PipelineError, match=re.escape(f"{folder}: the checkpoint cannot be loaded: ")):
        load_encoder(folder, CPU, torch.float32)


def test_first_of_several_end_tokens_is_trained(tmp_path: Path) -> None:
    text = {**_config()["text_config"], "eos_token_id": [202, 2]}
    several = PromptTokenizer(copy_of(tmp_path / "c", config={**_config(), "text_config": text}), "{question}")
    one = PromptTokenizer(embedded_checkpoint(), "{question}")
    assert several.targets(["red"]) == one.targets(["red"])
    assert several.fingerprint() == one.fingerprint()


@pytest.mark.parametrize("section", SECTIONS)
def test_missing_config_section_is_an_error(section: str, tmp_path: Path) -> None:
    message = refused(copy_of(tmp_path / "c", config={key: _config()[key] for key in _config() if key != section}))
    assert "config.json requires" in message or "missing " in message


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer": "{"}, "its tokenizer (tokenizer.json, tokenizer_config.json) cannot be loaded"),
        ({"tokenizer": "[]"}, "its tokenizer (tokenizer.json, tokenizer_config.json) cannot be loaded"),
        ({"tokenizer": {}}, "its tokenizer (tokenizer.json, tokenizer_config.json) cannot be loaded"),
        ({"tokenizer": None}, "the checkpoint has no tokenizer"),
        ({"tokenizer": None, "vocab": {"a": 0}}, "(tokenizer.json or vocab.json with merges.txt)"),
        ({"tokenizer_config": "{"}, "its tokenizer (tokenizer.json, tokenizer_config.json) cannot be loaded"),
        ({"tokenizer_config": {"tokenizer_class": "Nothing"}}, ""),
        ({"tokenizer_config": None}, "the tokenizer has 540 tokens, the language model 539"),
        ({"generation_config": "{"}, ""),
        ({"generation_config": {"eos_token_id": "x", "num_beams": "many"}}, ""),
        ({"generation_config": None}, ""),
        ({"processor_config": None}, "the checkpoint has no image processor"),
        ({"processor_config": "{"}, "processor_config.json: not readable as JSON"),
        ({"processor_config": "[]"}, "processor_config.json: not a JSON object"),
        ({"processor_config": None, "preprocessor_config": "{"}, "preprocessor_config.json: not readable as JSON"),
    ],
)
def test_damaged_small_file_is_an_error_with_its_name(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = copy_of(tmp_path / "c", **files)
    if message:
        assert message in refused(folder)
    else:
        for begin in BEGINNINGS:
            begin(folder)


@pytest.mark.parametrize(
    "setting",
    [
        {"size": {"height": 32, "width": 32}},
        {"size": {"height": "64", "width": 64}},
        {"size": {"height": -64, "width": 64}},
        {"size": 7.5},
        {"image_mean": [0.5]},
        {"image_mean": "grey"},
        {"image_std": [0.0, 0.0, 0.0]},
        {"rescale_factor": "1/255"},
        {"rescale_factor": None},
        {"resample": "cubic"},
        {"resample": 99},
        {"do_resize": "yes"},
        {"do_normalize": 3},
    ],
    ids=str,
)
def test_invalid_image_processor_value_is_an_error_with_its_key(setting: dict[str, Any], tmp_path: Path) -> None:
    values = json.loads((embedded_checkpoint() / "processor_config.json").read_text())["image_processor"] | setting
    message = refused(copy_of(tmp_path / "c", processor_config=None, preprocessor_config=values))
    assert next(iter(setting)) in message or "size" in message
    assert str(tmp_path / "c") in message


def in_shards(folder: Path, change: Callable[[dict[str, Any]], object] = lambda index: None) -> Path:
    """The embedded checkpoint with one shard per half and a changed index."""
    copy_of(folder, model=None)
    halves = {"e.safetensors": ENCODER_PREFIXES, "l.safetensors": LANGUAGE_MODEL_PREFIXES}
    shards = {shard: {name: one for name, one in _tensors().items() if name.startswith(half)}
              for shard, half in halves.items()}  # fmt: skip
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, tensors in shards.items() for name in tensors}}
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "weight_map is not a JSON object"),
        (lambda index: index.update(weight_map=[]), "weight_map is not a JSON object"),
        (lambda index: index["weight_map"].pop(WORDS), f"{INDEX}: missing {WORDS}"),
        (lambda index: index["weight_map"].update({WORDS: "e.safetensors"}), f"e.safetensors: missing {WORDS}"),
        (
            lambda index: index["weight_map"].update({"query_tokens": "l.safetensors"}),
            "l.safetensors: missing query_tokens",
        ),
        (lambda index: index["weight_map"].update({WORDS: "../l.safetensors"}), "which is not a file of this folder"),
        (lambda index: index["weight_map"].update({WORDS: "/etc/passwd"}), "which is not a file of this folder"),
        (lambda index: index["weight_map"].update({WORDS: ""}), "which is not a file of this folder"),
        (lambda index: index["weight_map"].update({WORDS: 3}), "which is not a file of this folder"),
    ],
)
def test_invalid_index_is_an_error(change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path) -> None:
    for begin in BEGINNINGS:
        begin(in_shards(tmp_path / begin.__name__))
    assert message in refused(in_shards(tmp_path / "damaged", change))


def test_other_half_may_be_missing_as_a_whole_only(tmp_path: Path) -> None:
    alone = with_tensors(
        tmp_path / "alone", lambda tensors: [tensors.pop(name) for name in [*tensors] if name.startswith("language")]
    )
    begin_stage_one(alone)
    with pytest.raises(PipelineError, match="missing language_projection"):
        begin_stage_two(alone)
    assert WORDS in refused(with_tensors(tmp_path / "part", lambda tensors: tensors.pop(WORDS)))


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def overlapping(data: bytes) -> bytes:
    """All tensors at the beginning of the data."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for name, one in header.items():
        if name != "__metadata__":
            begin, end = one["data_offsets"]
            one["data_offsets"] = [0, end - begin]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        overlapping,
        lambda data: data + b"more",
        lambda data: data[:8] + b"x" + data[9:],
        lambda data: b"",
        lambda data: struct.pack("<Q", 2) + b"[]",
        lambda data: struct.pack("<Q", 2**62) + data[8:],
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    ],
)
def test_damaged_weight_file_is_an_error(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    folder = copy_of(tmp_path / "c", model=None)
    (folder / WEIGHTS).write_bytes(damage((embedded_checkpoint() / WEIGHTS).read_bytes()))
    message = refused(folder)
    assert f"{folder / WEIGHTS}: not a readable safetensors file" in message
    assert ("Git LFS pointer" in message) is (folder / WEIGHTS).read_bytes().startswith(b"version")


@pytest.mark.parametrize("command", ["precompute", "precompute --dry-run", "train", "train --dry-run"])
def test_command_prints_one_error_and_writes_nothing(
    command: str, data_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "vision_model.embeddings.patch_embedding.weight"
    folder = with_tensors(data_set / "checkpoint", lambda tensors: tensors.pop(name))
    monkeypatch.setattr("pipeline.encoding.preflight.scan_dataset", lambda *_: pytest.fail("images were read"))
    config = write_config(data_set, model={"checkpoint": str(folder)})
    stage, *words = command.split()
    done = CliRunner().invoke(main, [stage, str(config), *words])
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"{WEIGHTS}: missing {name}" in done.stderr
    assert not (data_set / "cache").exists()
    assert not (data_set / "runs").exists()


def test_merge_unties_weights_that_differ(tmp_path: Path) -> None:
    """`from_pretrained` loads both of two different tied weights."""
    from pipeline.blip2.merge import write_merged

    folder = with_tensors(tmp_path / "both", lambda tensors: tensors.update({HEAD: 2 * tensors[WORDS]}))
    (tmp_path / "merged").mkdir()
    write_merged(folder, add_lora(load_language_half(folder, CPU, torch.float32), 4, 8, 0.0, ("q_proj",), "none"),
                 tmp_path / "merged")  # fmt: skip
    merged = load_language_half(tmp_path / "merged", CPU, torch.float32, bits=None)
    assert torch.equal(merged.get_output_embeddings().weight, 2 * merged.get_input_embeddings().weight)
