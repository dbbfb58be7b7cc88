"""What is exported answers as the run does, in plain transformers, and appears whole or not at all."""

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
    """Trained long enough to answer one thing and another."""
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
    """A run with a random adapter of another kind, biases as well."""
    other = Run(folder)
    other.write_config(load_config(run.config, (f"quantization.bits={bits or 'null'}",)))
    model = add_lora(load_base(load_config(other.config)), 4, 8, 0.0, targets, bias)
    make_lora_nonzero(model)
    save_adapter(model, other.adapter)
    return other


def dequantised(config: Config) -> Blip2LanguageHalf:
    """The language half in full precision, with the values of the 4-bit weights."""
    plain = load_base(config.model_copy(update={"quantization": config.quantization.model_copy(update={"bits": None})}))
    for name, weight in load_base(config).named_parameters():
        if isinstance(weight, Params4bit):
            plain.get_parameter(name).data.copy_(dequantize_4bit(weight.data, weight.quant_state))
    return plain


def answers_of(run: Run, *overrides: str, with_adapter: bool = True) -> list[str]:
    summary = evaluate(run, overrides, with_adapter)
    return [row["answer"] for row in json.loads(Path(summary["results"]).read_text())]


def asked(run: Run) -> list[VQAExample]:
    return examples_of(FeatureReader(load_config(run.config).cache.dir).text("val"))


def pipe(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@BITS
def test_plain_transformers_answers_with_the_merged_model_as_evaluate_does(
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
        plain = list(plain_answers(model.eval(), processor, asked(run)))
        dtypes = (torch.float16, rounding.DTYPE_OF_4_BIT_ANSWERS if bits else torch.float32)
        apart = max(rounding.LOGITS[dtype] for dtype in dtypes)
        assert_equal_but_for_ties(expected, plain, load_tokenizer(load_config(run.config)), apart)
    found = summary["differences"]
    assert found["questions"] == 100
    assert found["equal_answers"] > 90, "ties excepted, all are equal; an adapter that is left out changes most"
    assert 0 < found["mean_of_logits"] < found["largest_of_logits"] < rounding.LOGITS[torch.float16]


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
def test_weights_are_those_of_pefts_own_merge_into_the_dequantised_model(
    run: Run, checkpoint: Path, bits: int | None, targets: tuple[str, ...], bias: str, tmp_path: Path
) -> None:
    other = untrained(run, bits, targets, bias, tmp_path / "run")
    config = load_config(other.config)
    plain = dequantised(config)
    if "lm_head" in targets:  # PEFT's merge would change the embedding, which is the same tensor, with it
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


def test_an_adapter_on_one_of_two_tied_weights_unties_them(run: Run, tmp_path: Path) -> None:
    other = untrained(run, 4, ("lm_head",), "none", tmp_path / "run")
    export(other, tmp_path / "merged", merge=True)
    model, loading = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(loading.values()), loading
    assert not torch.equal(model.language_model.lm_head.weight, model.get_input_embeddings().weight)
    processor = load_processor(tmp_path / "merged", "left")
    plain = list(plain_answers(model.float(), processor, asked(other)))
    apart = max(rounding.LOGITS[dtype] for dtype in (torch.float16, rounding.DTYPE_OF_4_BIT_ANSWERS))
    assert_equal_but_for_ties(answers_of(other), plain, load_tokenizer(load_config(other.config)), apart)


def test_a_large_model_is_written_in_shards(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_one = export(run, tmp_path / "one", merge=True)
    monkeypatch.setattr("pipeline.blip2.merge.MAX_SHARD_BYTES", 500_000)
    assert export(run, tmp_path / "merged", merge=True)["differences"] == in_one["differences"]
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


def test_a_merged_model_is_a_checkpoint_of_this_pipeline(run: Run, tmp_path: Path) -> None:
    export(run, tmp_path / "merged", merge=True)
    ours = answers_of(run, f"model.checkpoint={tmp_path}/merged", "quantization.bits=null", with_adapter=False)
    full = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    plain = list(plain_answers(full, load_processor(tmp_path / "merged", "left"), asked(run)))
    assert_equal_but_for_ties(ours, plain, load_tokenizer(load_config(run.config)), rounding.LOGITS[torch.float32])


def test_the_exported_adapter_loads_into_plain_peft(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    summary = export(run, tmp_path / "adapters" / "first")
    folder = Path(summary["destination"])
    assert {file.name for file in folder.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors"}  # fmt: skip
    assert (summary["merged"], "differences" in summary) == (False, False)
    assert summary["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    model = PeftModel.from_pretrained(load_full(checkpoint, 4), folder, is_trainable=True).eval()
    assert len(trainable(model)) == 16
    plain = list(plain_answers(model, load_processor(checkpoint, "left"), asked(run)))
    tokenizer = load_tokenizer(load_config(run.config))
    assert_equal_but_for_ties(answers_of(run), plain, tokenizer, rounding.LOGITS[rounding.DTYPE_OF_4_BIT_ANSWERS])


def test_the_card_loads_what_it_describes(run: Run, tmp_path: Path) -> None:
    evaluate(run)
    answers = [json.loads(line) for line in run.predictions("val", True).read_text().splitlines()]
    surest = max(range(len(answers)), key=lambda place: answers[place]["probability"])  # far from any tie
    example = asked(run)[surest]
    for merge in False, True:
        export(run, tmp_path / str(merge), merge=merge)
        card = (tmp_path / str(merge) / "README.md").read_text()
        assert f"library_name: {'transformers' if merge else 'peft'}\n" in card
        assert "base_model" not in card  # "embedded" is none that the hub knows
        assert "| val, with the adapter | " in card
        assert read_record(run)["cache"]["fingerprint"] in card
        code = card.split("```python\n")[1].split("```")[0]
        names: dict[str, Any] = {"FOLDER": str(tmp_path / str(merge)), "image": Image.open(example.image)}
        exec(code.replace("{question}", example.question), names)
        assert names["answer"] == answers[surest]["answer"]
        modes = {path.stat().st_mode for path in (tmp_path / str(merge)).iterdir()}
        assert len(modes) == 1, "no file is its owner's alone"
    other = Run(tmp_path / "hub")
    shutil.copytree(run.path, other.path)
    named = load_config(run.config, ("model.checkpoint=Salesforce/blip2-opt-2.7b",))
    (other.config).write_text(named.to_yaml())
    export(other, tmp_path / "named")
    assert "\nbase_model: Salesforce/blip2-opt-2.7b\n" in (tmp_path / "named" / "README.md").read_text()


def test_what_is_there_is_never_replaced(run: Run, tmp_path: Path) -> None:
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
def test_half_an_export_leaves_nothing(
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


def test_a_killed_export_leaves_no_destination(run: Run, tmp_path: Path) -> None:
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


def test_a_disk_without_room_is_told_before(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.commands.export, "free_disk_bytes", lambda folder: 4_000_000)
    with pytest.raises(PipelineError, match=r"the merged model takes 21\.\d\d MB, and 4\.00 MB are free"):
        export(run, tmp_path / "merged", merge=True)
    assert list(tmp_path.iterdir()) == []


def test_a_value_beyond_float16_is_told(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(checkpoint / WEIGHTS).items()}
    tensors["qformer.layernorm.bias"][3] = 70_000
    save_file(tensors, tmp_path / "checkpoint" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(PipelineError, match=r"qformer\.layernorm\.bias: its largest value is 70144, but the maximum"):
        export(run, tmp_path / "merged", (f"model.checkpoint={tmp_path}/checkpoint",), merge=True)
    assert not (tmp_path / "merged").exists()


def test_a_checkpoint_that_lacks_a_tensor_is_told(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    tensors = load_file(checkpoint / WEIGHTS)
    del tensors["qformer.layernorm.bias"]
    save_file(tensors, tmp_path / "checkpoint" / WEIGHTS, metadata={"format": "pt"})
    config = load_config(run.config)
    (tmp_path / "merged").mkdir()
    with pytest.raises(PipelineError, match=r"missing qformer\.layernorm\.bias; download it again"):
        write_merged(tmp_path / "checkpoint", load_adapter(load_base(config), run.adapter), tmp_path / "merged")


def test_without_a_cache_or_memory_the_models_are_not_compared(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = pipe("export", run.path, tmp_path / "one", "--merge", "cache.dir=/no/such/cache", "--json")
    assert (done.exit_code, json.loads(done.stdout)["differences"]) == (0, None)
    assert "the merged model is not compared with the run: no cache at /no/such/cache" in done.stderr
    monkeypatch.setattr(pipeline.commands.export, "free_memory_bytes", lambda device: 1_000_000)
    done = pipe("export", run.path, tmp_path / "two", "--merge")
    assert done.exit_code == 0
    assert "is not compared with the run: that takes 8.81 MB of memory, and 1.00 MB are free" in done.stderr


def test_without_memory_to_compare_the_merged_model_is_there(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Blip2LanguageHalf, "logits", short)
    summary = export(run, tmp_path / "merged", merge=True)
    assert summary["differences"] is None
    assert "the merged model is not compared with the run: out of memory" in capsys.readouterr().err
    assert (tmp_path / "merged" / "config.json").exists()


def test_an_unfinished_run_is_refused(run: Run, tmp_path: Path) -> None:
    unfinished = Run(tmp_path / "unfinished")
    unfinished.write_config(load_config(run.config))
    with pytest.raises(PipelineError, match="no adapter yet"):
        export(unfinished, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


def test_a_push_makes_a_private_repository_of_what_lies_in_the_folder(
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
def test_a_push_that_fails_is_told_in_a_line_and_loses_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, call: str
) -> None:
    error, message = _failures()[reason]

    def fail(*_: object, **how: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.create_repo", lambda repo, **how: "url")
    monkeypatch.setattr(f"huggingface_hub.{call}", fail)
    done = pipe("export", run.path, tmp_path / "dest", "--push", "me/adapter")
    assert done.exit_code == 1
    told = done.stderr.splitlines()
    assert told[-1].startswith(f"pipe: {tmp_path}/dest is complete, but was not uploaded: {message}")
    assert told[-1].endswith(f"Then run: hf upload me/adapter {tmp_path}/dest")
    assert (tmp_path / "dest" / "adapter_model.safetensors").is_file()


def test_without_a_network_a_push_is_told(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own client, against a port on which nobody listens."""
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    with pytest.raises(PipelineError, match=r"no connection .*check the network"):
        export(run, tmp_path / "dest", repo="me/adapter")
    assert (tmp_path / "dest").is_dir()


def test_a_repository_that_none_can_be_called_is_refused_first(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--push 'a/b/c' is not a valid repository name"):
        export(run, tmp_path / "dest", repo="a/b/c")
    assert list(tmp_path.iterdir()) == []
