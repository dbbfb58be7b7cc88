"""Exported models give the run's answers in plain transformers, and exports are complete or absent."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rounding
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from click.testing import CliRunner, Result
from data_set import SAVES_LORA_ONLY, write_config, write_data_set
from peft import PeftModel
from PIL import Image
from plain_answers import assert_equal_but_for_ties, plain_answers
from plain_model import examples_of, load_full, load_processor, make_lora_nonzero, trainable
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, Blip2ForConditionalGeneration

import pipeline.commands.export
from cache.reader import FeatureReader
from pipeline.batches.split import load_tokenizer
from pipeline.blip2.base_model import load_base
from pipeline.blip2.checkpoint import INDEX, WEIGHTS
from pipeline.blip2.language_model import Blip2LanguageHalf, add_lora, load_adapter, save_adapter
from pipeline.blip2.merge import write_merged
from pipeline.cli import main
from pipeline.commands.evaluate import evaluate
from pipeline.commands.export import export
from pipeline.commands.precompute import precompute
from pipeline.commands.train import train_run
from pipeline.common.errors import ConfigError, PipelineError
from pipeline.config import Config, load_config
from pipeline.data.examples import VQAExample
from pipeline.runs.record import read_record
from pipeline.runs.run import Run

QUESTIONS = 102
BITS = pytest.mark.parametrize("bits", [4, None], ids=["nf4", "float32"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a run trained long enough to give different answers."""
    folder = tmp_path_factory.mktemp("trained")
    write_data_set(folder, num_images=QUESTIONS // 3 * 4)
    config = load_config(
        write_config(folder, train={"max_steps": 40, "batch_size": 32, "learning_rate": 3e-3, "save_steps": 100})
    )
    precompute(config)
    run = Run(folder / "runs" / "first")
    train_run(config, run)
    return run


def untrained(run: Run, bits: int | None, targets: tuple[str, ...], bias: str, folder: Path) -> Run:
    """Return a run with a random adapter on other modules, optionally with biases."""
    other = Run(folder)
    other.write_config(load_config(run.config, (f"quantization.bits={bits or 'null'}",)))
    model = add_lora(load_base(load_config(other.config)), 4, 8, 0.0, targets, bias)
    make_lora_nonzero(model)
    save_adapter(model, other.adapter)
    return other


def dequantized(config: Config) -> Blip2LanguageHalf:
    """Return the language half in full precision, with the values of the 4-bit weights."""
    plain = load_base(config.model_copy(update={"quantization": config.quantization.model_copy(update={"bits": None})}))
    for name, weight in load_base(config).named_parameters():
        if isinstance(weight, Params4bit):
            plain.get_parameter(name).data.copy_(dequantize_4bit(weight.data, weight.quant_state))
    return plain


def answers_of(run: Run, *overrides: str, with_adapter: bool = True) -> list[str]:
    summary = evaluate(run, overrides, with_adapter)
    return [row["answer"] for row in json.loads(Path(summary.results).read_text())]


def examples_in(run: Run) -> list[VQAExample]:
    return examples_of(FeatureReader(load_config(run.config).cache.dir).text("val"))


def pipe(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@BITS
def test_merged_model_in_plain_transformers_gives_the_answers_of_evaluate(
    run: Run, bits: int | None, tmp_path: Path
) -> None:
    quantization = f"quantization.bits={bits or 'null'}"
    summary = export(run, tmp_path / "merged", (quantization,), merge=True)
    expected = answers_of(run, quantization)
    assert len(expected) == QUESTIONS
    assert len(set(expected)) > 5
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    processor.tokenizer.padding_side = "left"
    for dtype in "auto", torch.float32:
        model, loading = Blip2ForConditionalGeneration.from_pretrained(
            tmp_path / "merged", dtype=dtype, output_loading_info=True
        )
        assert not any(loading.values()), loading
        assert model.language_model.dtype == (torch.float16 if dtype == "auto" else dtype)
        assert not hasattr(model.config, "quantization_config")
        assert model.language_model.lm_head.weight is model.get_input_embeddings().weight
        plain = list(plain_answers(model.eval(), processor, examples_in(run)))
        dtypes = (torch.float16, rounding.DTYPE_OF_4_BIT_ANSWERS if bits else torch.float32)
        tolerance = max(rounding.LOGITS[dtype] for dtype in dtypes)
        assert_equal_but_for_ties(expected, plain, load_tokenizer(load_config(run.config)), tolerance)
    found = summary.differences
    assert found is not None
    assert found["questions"] == 100
    assert found["equal_answers"] > 90, "all are equal except ties; without the adapter most differ"
    assert 0 < found["mean_logit_difference"] < found["max_logit_difference"] < rounding.LOGITS[torch.float16]


@pytest.mark.parametrize(
    ("targets", "bias"),
    [
        (("q_proj", "v_proj"), "none"),
        pytest.param(("q_proj", "fc1"), "lora_only", marks=SAVES_LORA_ONLY),
        (("out_proj", "language_projection"), "all"),
        (("k_proj", "lm_head"), "none"),
    ],
)
@BITS
def test_merged_weights_equal_those_of_peft_on_the_dequantized_model(
    run: Run, checkpoint: Path, bits: int | None, targets: tuple[str, ...], bias: str, tmp_path: Path
) -> None:
    other = untrained(run, bits, targets, bias, tmp_path / "run")
    config = load_config(other.config)
    plain = dequantized(config)
    if "lm_head" in targets:  # untied, because PEFT's merge would change the tied embedding too
        head = plain.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    merged = load_adapter(plain, other.adapter).merge_and_unload()

    export(other, tmp_path / "merged", merge=True)
    found = load_file(tmp_path / "merged" / WEIGHTS)
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    assert ("language_model.lm_head.weight" in found) is ("lm_head" in targets)
    for name, weight in merged.named_parameters():
        assert torch.equal(found.pop(name), weight.detach().half()), name
    original = load_file(checkpoint / WEIGHTS)
    for name, tensor in found.items():
        assert torch.equal(tensor, original[name].half()), name


def test_adapter_on_one_of_two_tied_weights_unties_them(run: Run, tmp_path: Path) -> None:
    other = untrained(run, 4, ("lm_head",), "none", tmp_path / "run")
    export(other, tmp_path / "merged", merge=True)
    model, loading = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(loading.values()), loading
    assert not torch.equal(model.language_model.lm_head.weight, model.get_input_embeddings().weight)
    processor = load_processor(tmp_path / "merged", "left")
    plain = list(plain_answers(model.float(), processor, examples_in(other)))
    tolerance = max(rounding.LOGITS[dtype] for dtype in (torch.float16, rounding.DTYPE_OF_4_BIT_ANSWERS))
    assert_equal_but_for_ties(answers_of(other), plain, load_tokenizer(load_config(other.config)), tolerance)


def test_large_model_is_written_in_shards(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unsharded = export(run, tmp_path / "one", merge=True)
    monkeypatch.setattr("pipeline.blip2.merge.MAX_SHARD_BYTES", 500_000)
    assert export(run, tmp_path / "merged", merge=True).differences == unsharded.differences
    index = json.loads((tmp_path / "merged" / INDEX).read_text())
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 5
    assert all(file.stat().st_size < 520_000 for file in files)
    whole = load_file(tmp_path / "one" / WEIGHTS)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    pieces = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert pieces.keys() == whole.keys()
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)
    assert Blip2ForConditionalGeneration.from_pretrained(tmp_path / "merged").num_parameters() > 2e6


def test_merged_model_is_a_valid_checkpoint_of_the_pipeline(run: Run, tmp_path: Path) -> None:
    export(run, tmp_path / "merged", merge=True)
    ours = answers_of(run, f"model.checkpoint={tmp_path}/merged", "quantization.bits=null", with_adapter=False)
    full = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    plain = list(plain_answers(full, load_processor(tmp_path / "merged", "left"), examples_in(run)))
    assert_equal_but_for_ties(ours, plain, load_tokenizer(load_config(run.config)), rounding.LOGITS[torch.float32])


def test_exported_adapter_loads_into_plain_peft(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    summary = export(run, tmp_path / "adapters" / "first")
    folder = Path(summary.destination)
    assert {file.name for file in folder.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors"}  # fmt: skip
    assert (summary.merged, summary.differences, summary.url) == (False, None, None)
    assert summary.bytes == sum(file.stat().st_size for file in folder.iterdir())
    model = PeftModel.from_pretrained(load_full(checkpoint, 4), folder, is_trainable=True).eval()
    assert len(trainable(model)) == 16
    plain = list(plain_answers(model, load_processor(checkpoint, "left"), examples_in(run)))
    tokenizer = load_tokenizer(load_config(run.config))
    assert_equal_but_for_ties(answers_of(run), plain, tokenizer, rounding.LOGITS[rounding.DTYPE_OF_4_BIT_ANSWERS])


def test_model_card_code_loads_the_model(run: Run, tmp_path: Path) -> None:
    evaluate(run)
    answers = [json.loads(line) for line in run.predictions("val", True).read_text().splitlines()]
    most_probable = max(range(len(answers)), key=lambda index: answers[index]["probability"])  # far from any tie
    example = examples_in(run)[most_probable]
    for merge in False, True:
        export(run, tmp_path / str(merge), merge=merge)
        card = (tmp_path / str(merge) / "README.md").read_text()
        assert f"library_name: {'transformers' if merge else 'peft'}\n" in card
        assert "base_model" not in card  # "embedded" is not on the hub
        assert "| val, with the adapter | " in card
        assert read_record(run)["cache"]["fingerprint"] in card
        code = card.split("```python\n")[1].split("```")[0]
        names: dict[str, Any] = {"FOLDER": str(tmp_path / str(merge)), "image": Image.open(example.image)}
        exec(code.replace("{question}", example.question), names)
        assert names["answer"] == answers[most_probable]["answer"]
        modes = {path.stat().st_mode for path in (tmp_path / str(merge)).iterdir()}
        assert len(modes) == 1, "all files have the same permissions"
    other = Run(tmp_path / "hub")
    shutil.copytree(run.path, other.path)
    named = load_config(run.config, ("model.checkpoint=Salesforce/blip2-opt-2.7b",))
    (other.config).write_text(named.to_yaml())
    export(other, tmp_path / "named")
    assert "\nbase_model: Salesforce/blip2-opt-2.7b\n" in (tmp_path / "named" / "README.md").read_text()


def test_existing_destination_is_never_replaced(run: Run, tmp_path: Path) -> None:
    (tmp_path / "dest").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "new.partial").mkdir()
    before = sorted(tmp_path.iterdir())
    for name in "dest", "dangling":
        done = pipe("export", run.path, tmp_path / name)
        assert (done.exit_code, "exists already" in done.stderr) == (1, True)
    with pytest.raises(PipelineError, match=r"new\.partial: left by an export that was killed"):
        export(run, tmp_path / "new", merge=True)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_failed_export_leaves_no_files(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    written: list[Path] = []

    def save_some(tensors: object, path: Path, **how: object) -> None:
        written.append(path)
        path.write_text("half")
        if len(written) == 2:
            raise error

    monkeypatch.setattr("pipeline.blip2.merge.MAX_SHARD_BYTES", 500_000)
    monkeypatch.setattr("pipeline.blip2.merge.save_file", save_some)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        export(run, tmp_path / "merged", merge=True)
    assert len(written) == 2
    assert list(tmp_path.iterdir()) == []


def test_killed_export_leaves_no_destination(run: Run, tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; import pipeline.blip2.merge;"
        "from pipeline.commands.export import export;"
        "from pipeline.runs.run import Run; pipeline.blip2.merge.MAX_SHARD_BYTES = 500_000;"
        "save = pipeline.blip2.merge.save_file;"
        "pipeline.blip2.merge.save_file = lambda t, path, **how: save(t, path, **how) "
        "if '00001' in path.name else os.kill(os.getpid(), 9);"
        "export(Run(Path(sys.argv[1])), Path(sys.argv[2]), merge=True)"
    )
    done = subprocess.run([sys.executable, "-c", code, run.path, tmp_path / "merged"], env=dict(os.environ))
    assert done.returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == ["merged.partial"]
    shutil.rmtree(tmp_path / "merged.partial")
    export(run, tmp_path / "merged", merge=True)


def test_insufficient_disk_space_fails_before_writing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.commands.export, "free_disk_bytes", lambda folder: 4_000_000)
    with pytest.raises(PipelineError, match=r"the merged model needs 21\.\d\d MB, and 4\.00 MB are free"):
        export(run, tmp_path / "merged", merge=True)
    assert list(tmp_path.iterdir()) == []


def test_value_beyond_float16_is_an_error(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(checkpoint / WEIGHTS).items()}
    tensors["qformer.layernorm.bias"][3] = 70_000
    save_file(tensors, tmp_path / "checkpoint" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(
        PipelineError, match=r"qformer\.layernorm\.bias: its largest value is 70144, but the maximum of"
    ):
        export(run, tmp_path / "merged", (f"model.checkpoint={tmp_path}/checkpoint",), merge=True)
    assert not (tmp_path / "merged").exists()


def test_missing_tensor_is_an_error(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    tensors = load_file(checkpoint / WEIGHTS)
    del tensors["qformer.layernorm.bias"]
    save_file(tensors, tmp_path / "checkpoint" / WEIGHTS, metadata={"format": "pt"})
    config = load_config(run.config)
    (tmp_path / "merged").mkdir()
    with pytest.raises(PipelineError, match=r"missing qformer\.layernorm\.bias; download it again"):
        write_merged(tmp_path / "checkpoint", load_adapter(load_base(config), run.adapter), tmp_path / "merged")


def test_missing_cache_or_memory_skips_the_comparison(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = pipe("export", run.path, tmp_path / "one", "--merge", "cache.dir=/no/such/cache", "--json")
    assert (done.exit_code, json.loads(done.stdout)["differences"]) == (0, None)
    assert "the merged model is not compared with the run: no cache at /no/such/cache" in done.stderr
    monkeypatch.setattr(pipeline.commands.export, "free_memory_bytes", lambda device: 1_000_000)
    done = pipe("export", run.path, tmp_path / "two", "--merge")
    assert done.exit_code == 0
    assert "is not compared with the run: it needs 8.81 MB of memory, and 1.00 MB are free" in done.stderr


def test_out_of_memory_in_the_comparison_keeps_the_export(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Blip2LanguageHalf, "logits", out_of_memory)
    summary = export(run, tmp_path / "merged", merge=True)
    assert summary.differences is None
    assert "the merged model is not compared with the run: out of memory" in capsys.readouterr().err
    assert (tmp_path / "merged" / "config.json").exists()


def test_unfinished_run_is_rejected(run: Run, tmp_path: Path) -> None:
    unfinished = Run(tmp_path / "unfinished")
    unfinished.write_config(load_config(run.config))
    with pytest.raises(PipelineError, match="no adapter yet"):
        export(unfinished, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


def test_push_uploads_the_folder_to_a_private_repository(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def create_repo(repo: str, **how: object) -> str:
        calls.append({"repo": repo, **how})
        return f"https://huggingface.co/{repo}"

    monkeypatch.setattr("huggingface_hub.create_repo", create_repo)
    monkeypatch.setattr("huggingface_hub.upload_folder", lambda **how: calls.append(how))
    done = pipe("export", run.path, tmp_path / "dest", "--push", "me/adapter", "--json")
    assert json.loads(done.stdout)["url"] == "https://huggingface.co/me/adapter"
    assert calls[0] == {"repo": "me/adapter", "private": True, "exist_ok": True}
    assert (calls[1]["repo_id"], calls[1]["folder_path"]) == ("me/adapter", tmp_path / "dest")


def _failures() -> dict[str, tuple[Exception, str]]:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    def answered(status: int) -> HfHubHTTPError:
        error = HfHubHTTPError.__new__(HfHubHTTPError)
        Exception.__init__(error, f"{status} Client Error\nwith more lines")
        error.response = SimpleNamespace(status_code=status)
        return error

    return {
        "no token": (answered(401), "no valid token; run `hf auth login`"),
        "no right": (answered(403), "the token has no write access to me/adapter"),
        "hub is down": (answered(503), "the hub returned status 503 (503 Client Error)"),
        "no network": (ConnectionError("Connection refused"), "no connection (Connection refused); check the network"),
        "not local": (LocalEntryNotFoundError("nothing"), "no connection (nothing)"),
        "offline": (OfflineModeIsEnabled("offline mode is enabled."), "no connection (offline mode is enabled)"),
    }


@pytest.mark.parametrize("reason", _failures())
@pytest.mark.parametrize("call", ["create_repo", "upload_folder"])
def test_failed_push_is_a_one_line_error_and_keeps_the_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, call: str
) -> None:
    error, message = _failures()[reason]

    def fail(*_: object, **how: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.create_repo", lambda repo, **how: "url")
    monkeypatch.setattr(f"huggingface_hub.{call}", fail)
    done = pipe("export", run.path, tmp_path / "dest", "--push", "me/adapter")
    assert done.exit_code == 1
    lines = done.stderr.splitlines()
    assert lines[-1].startswith(f"pipe: {tmp_path}/dest is complete, but was not uploaded: {message}")
    assert lines[-1].endswith(f"Then run: hf upload me/adapter {tmp_path}/dest")
    assert (tmp_path / "dest" / "adapter_model.safetensors").is_file()


def test_push_without_network_is_an_error(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own client fails on a closed port."""
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    with pytest.raises(PipelineError, match=r"no connection .*check the network"):
        export(run, tmp_path / "dest", push="me/adapter")
    assert (tmp_path / "dest").is_dir()


def test_invalid_repository_name_is_rejected_first(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--push 'a/b/c' is not a valid repository name"):
        export(run, tmp_path / "dest", push="a/b/c")
    assert list(tmp_path.iterdir()) == []
