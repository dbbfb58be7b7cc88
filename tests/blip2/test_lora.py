"""The modules named in `lora` are trained, saved, and adapted on the full model by plain PEFT."""

import json
import shutil
from pathlib import Path

import pytest
import rounding
import torch
from click.testing import CliRunner
from data_set import SAVES_LORA_ONLY
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from plain_model import make_lora_nonzero
from safetensors.torch import load_file
from transformers import Blip2ForConditionalGeneration

from pipeline.batches.sequences import SequenceBuilder, pack, pack_prompts
from pipeline.blip2.base_model import load_base
from pipeline.blip2.language_model import Blip2LanguageHalf, add_lora, load_adapter, load_language_half, save_adapter
from pipeline.blip2.lora import require_all_saved
from pipeline.cli import main
from pipeline.commands.train import train_run
from pipeline.common.errors import ConfigError
from pipeline.config import Config, load_config
from pipeline.runs.run import Run

CPU = torch.device("cpu")
LORA_ONLY = pytest.param("lora_only", marks=SAVES_LORA_ONLY)
DECODER = "language_model.model.decoder."
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
EVERY = {f"{DECODER}layers.{layer}.{kind}" for layer in range(4) for kind in KINDS}


@pytest.fixture(scope="module")
def half(checkpoint: Path) -> Blip2LanguageHalf:
    """Shared: a test must remove the adapter that it adds."""
    return load_language_half(checkpoint, CPU, torch.float32, bits=None)


def adapted(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "v_projj"), "'v_projj' matches nothing in the language model; did you mean v_proj?"),
        (("nothing",), "'nothing' matches nothing in the language model. Allowed: fc1, fc2, k_proj,"),
        (("q_proj", "layers.9.self_attn.q_proj"), "'layers.9.self_attn.q_proj' matches nothing"),
        (("proj",), "'proj' matches nothing"),  # PEFT compares whole words of a path
        (("",), "'' matches nothing"),
        (("qkv",), "'qkv' matches nothing"),  # of the vision model
        (("query",), "'query' matches nothing"),  # of the Q-Former
        (("q_proj", "self_attn"), "'self_attn' is not a linear layer"),
        (("embed_tokens",), "'embed_tokens' is not a linear layer"),
        (("final_layer_norm",), "'final_layer_norm' is not a linear layer"),
        (("all_linear",), "did you mean all-linear?"),
    ],
)
def test_name_without_a_linear_layer_is_an_error(
    half: Blip2LanguageHalf, targets: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        add_lora(half, 4, 8, 0.0, targets, "none")
    assert message in str(caught.value)
    assert str(caught.value).startswith("lora.target_modules: ")
    assert adapted(half) == set()


@pytest.mark.parametrize("words", [[], ["--dry-run"]], ids=["train", "dry run"])
def test_invalid_target_is_a_usage_error_before_loading(
    cached: Config, tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.commands.train.load_base", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "config.yaml").write_text(cached.to_yaml())
    overrides = ["lora.target_modules=[q_proj,v_projj]", f"train.output_dir={tmp_path}/runs"]
    done = CliRunner().invoke(main, ["train", str(tmp_path / "config.yaml"), *overrides, *words])
    assert done.exit_code == 2
    assert "lora.target_modules: 'v_projj' matches nothing" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text", ["all-linear", "[all-linear]", "[all-linear, q_proj]"])
def test_all_linear_may_be_a_string_or_in_a_list(cached: Config, tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(cached.to_yaml())
    config = load_config(tmp_path / "config.yaml", (f"lora.target_modules={text}",))
    assert config.lora.target_modules[0] == "all-linear"


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj", "v_proj"), {name for name in EVERY if name.endswith(("q_proj", "v_proj"))}),
        (("all-linear",), EVERY),
        (("all-linear", "q_proj", "lm_head"), EVERY | {"language_model.lm_head"}),
        (("fc1",), {name for name in EVERY if name.endswith("fc1")}),
        (
            ("layers.0.self_attn.q_proj", "layers.2.fc2"),
            {f"{DECODER}layers.0.self_attn.q_proj", f"{DECODER}layers.2.fc2"},
        ),
        ((f"{DECODER}layers.1.self_attn.k_proj",), {f"{DECODER}layers.1.self_attn.k_proj"}),
        (("language_projection",), {"language_projection"}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("bias", ["none", LORA_ONLY])
def test_plain_peft_adapts_the_same_layers_on_the_full_model(
    half: Blip2LanguageHalf, checkpoint: Path, targets: tuple[str, ...], expected: set[str], bias: str, tmp_path: Path
) -> None:
    """The vision model has layers `fc1` and `fc2` too. Trained biases are included."""
    before = {name: weight.clone() for name, weight in half.state_dict().items()}
    model = add_lora(half, 4, 8, 0.0, targets, bias)
    try:
        make_lora_nonzero(model)
        save_adapter(model, tmp_path / "adapter")
        found = {name.removeprefix("base_model.model.") for name in adapted(model)}
        ids = torch.tensor([[2, 7, 8, 9]])
        features = torch.randn(1, 16, 128, generator=torch.Generator().manual_seed(0))
        ours = _logits(model.get_base_model(), features, ids)
    finally:
        model.unload()
        half.load_state_dict(before)
    assert found == expected
    full = Blip2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    plain = PeftModel.from_pretrained(full, str(tmp_path / "adapter"))
    assert {name.removeprefix("base_model.model.") for name in adapted(plain)} == expected
    theirs = _logits(plain.eval().get_base_model(), features, ids)
    assert torch.allclose(ours, theirs, atol=rounding.FLOAT32)
    assert not torch.allclose(ours, _logits(half, features, ids), atol=1e-2)


def _logits(model: torch.nn.Module, features: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        embedded = torch.cat([model.language_projection(features), model.get_input_embeddings()(ids)], 1)
        return model.language_model(inputs_embeds=embedded).logits


@pytest.mark.parametrize("bits", [4, None], ids=["nf4", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("bias", "trained"), [("all", 34), pytest.param("lora_only", 8, marks=SAVES_LORA_ONLY)])
def test_biases_are_trained_in_float32_in_every_dtype(
    cached: Config,
    builder: SequenceBuilder,
    tmp_path: Path,
    bits: int | None,
    dtype: torch.dtype,
    bias: str,
    trained: int,
) -> None:
    name = str(dtype).removeprefix("torch.")
    config = cached.model_copy(
        update={"quantization": cached.quantization.model_copy(update={"bits": bits, "compute_dtype": name})}
    )
    model = add_lora(load_base(config), 4, 8, 0.0, ("q_proj", "fc1"), bias).train()
    biases = {name: weight for name, weight in model.named_parameters() if name.endswith("bias")}
    biases = {name: weight for name, weight in biases.items() if weight.requires_grad}
    assert len(biases) == trained
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], 1e-3)
    before = {name: weight.detach().clone() for name, weight in biases.items()}
    for _ in range(2):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(**pack(builder.for_training([0, 1]))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in biases.items():
        assert weight.dtype == torch.float32, name
        if not name.endswith("k_proj.bias"):  # of which attention's softmax takes no notice
            assert not torch.equal(weight, before[name]), name
    with torch.inference_mode():  # as a validation does, without autocast
        said = model.eval().generate(**pack_prompts(builder.for_generation([0, 1])), max_new_tokens=2)
    assert said.log_probability.isfinite().all()

    save_adapter(model, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    again = load_adapter(load_base(config), tmp_path / "adapter")
    for name, weight in biases.items():
        assert torch.equal(saved[name], weight), name
        assert torch.equal(again.get_parameter(name), weight.to(dtype)), name


@pytest.fixture(scope="module")
def builder(cached: Config) -> SequenceBuilder:
    from pipeline.batches.split import open_split

    return open_split(cached, "train")


@SAVES_LORA_ONLY
def test_resumed_training_of_biases_in_half_precision_equals_an_uninterrupted_one(
    cached: Config, tmp_path: Path
) -> None:
    lora = cached.lora.model_copy(update={"target_modules": ("all-linear",), "bias": "lora_only", "r": 2})
    config = cached.model_copy(
        update={
            "lora": lora,
            "quantization": cached.quantization.model_copy(update={"compute_dtype": "bfloat16"}),
            "train": cached.train.model_copy(update={"batch_size": 4}),
        }
    )
    whole, stopped = Run(tmp_path / "whole"), Run(tmp_path / "stopped")
    train_run(config, whole)
    shutil.copytree(whole.path, stopped.path)
    for later in (stopped.adapter, stopped.checkpoints / "checkpoint-4"):
        shutil.rmtree(later)
    train_run(config, stopped, resume=True)
    first, second = (load_file(run.adapter / "adapter_model.safetensors") for run in (whole, stopped))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sum(name.endswith("bias") for name in first) == 24
    saved = json.loads((whole.adapter / "adapter_config.json").read_text())["target_modules"]
    assert {"q_proj", f"{DECODER}layers.0.fc1"} <= set(saved)
    assert "fc1" not in saved


@SAVES_LORA_ONLY
def test_peft_that_omits_biases_is_an_error(half: Blip2LanguageHalf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases before 0.21 omit those of `lora_only`."""
    import pipeline.blip2.lora

    saved = pipeline.blip2.lora.get_peft_model_state_dict
    model = add_lora(half, 4, 8, 0.0, ("q_proj",), "lora_only")
    try:
        require_all_saved(model)
        monkeypatch.setattr(
            pipeline.blip2.lora,
            "get_peft_model_state_dict",
            lambda model: {name: weight for name, weight in saved(model).items() if "lora_" in name},
        )
        with pytest.raises(ConfigError, match=r"lora\.bias: the installed release of peft does not save 4"):
            require_all_saved(model)
    finally:
        model.unload().requires_grad_(False)
