"""LoRA statistics against full-size matrices, the anomalies found in them, and resuming."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from pipeline.batches.sequences import ImageSequence, SequenceBuilder
from pipeline.blip2.base_model import load_base
from pipeline.blip2.language_model import add_lora
from pipeline.commands.train import train_run
from pipeline.config import Config
from pipeline.runs.run import Run
from pipeline.training.lora_monitor import CHECKPOINT_FILE, LoraMonitorCallback, adapted_layers
from pipeline.training.lora_statistics import Factors, find_anomalies, frozen_norm, measure
from pipeline.training.stopping import StopRequest
from pipeline.training.trainer import StageTwoTrainer

STATISTICS = ("norm", "ratio", "effective_rank", "change")
FROZEN = "layers.1.self_attn.q_proj"


def with_train(config: Config, **settings: object) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"lora_monitor_steps": 2, **settings})})


def rows(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.lora_updates.read_text().splitlines()]


def factors(n: int, out: int, width: int, r: int, seed: int = 0, scale: float = 1.0) -> Factors:
    rng = torch.Generator().manual_seed(seed)
    b, a = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((n, out, r), (n, r, width)))
    return Factors(scale * b * torch.logspace(0, -3, r, dtype=torch.float64), a)


def rank_by_svd(update: Tensor) -> float:
    singular = torch.linalg.svdvals(update.double())
    return math.exp(torch.special.entr(singular / singular.sum()).sum())


@pytest.mark.parametrize(("out", "width", "r"), [(48, 96, 4), (96, 48, 16), (64, 64, 1), (40, 40, 40)])
def test_statistics_match_those_of_the_full_matrices(out: int, width: int, r: int) -> None:
    now, before = factors(3, out, width, r), factors(3, out, width, r, seed=1)
    found = measure(Factors(*(one.float() for one in now)), before)
    update = now.b.float().double() @ now.a.float().double()
    torch.testing.assert_close(found["norm"], torch.linalg.matrix_norm(update), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        found["change"], torch.linalg.matrix_norm(update - before.b @ before.a), rtol=1e-12, atol=0
    )
    for rank, one in zip(found["effective_rank"], update, strict=True):
        assert rank.item() == pytest.approx(rank_by_svd(one), rel=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6, 1e-9, 1e-12])
def test_small_changes_are_accurate(size: float) -> None:
    before = factors(1, 60, 50, 8)
    now = Factors(*(old + size * new for old, new in zip(before, factors(1, 60, 50, 8, seed=1), strict=True)))
    wide = [[one[0].numpy().astype(np.longdouble) for one in pair] for pair in (now, before)]
    exact = np.sqrt(((wide[0][0] @ wide[0][1] - wide[1][0] @ wide[1][1]) ** 2).sum())
    reference_error = float(np.finfo(np.longdouble).eps) / size
    assert measure(now, before)["change"].item() == pytest.approx(float(exact), rel=1e-13 + 100 * reference_error)


def test_same_update_in_other_factors_has_almost_no_change() -> None:
    """2 B and A / 2 give the same update: the two terms of the change cancel."""
    before = factors(1, 60, 50, 8)
    found = measure(Factors(2 * before.b, before.a / 2), before)
    assert found["change"] < 1e-7 * found["norm"]


def test_zero_and_nonfinite_matrices_do_not_affect_others() -> None:
    now = factors(4, 20, 30, 4)
    now.b[1] = 0
    now.b[2, 0, 0], now.a[3, 0, 0] = math.nan, math.inf
    found = {key: values.tolist() for key, values in measure(now, now).items()}
    assert found["change"][:2] == [0, 0]
    assert (found["norm"][1], found["effective_rank"][1]) == (0, 0)
    assert found["effective_rank"][0] == pytest.approx(rank_by_svd(now.b[0] @ now.a[0]), rel=1e-6)
    assert all(math.isnan(values[row]) for values in found.values() for row in (2, 3))


@pytest.mark.parametrize("bits", [4, None])
@pytest.mark.parametrize("rank_stabilized", [True, False])
def test_scaling_and_frozen_weight_match_peft(
    cached: Config, tmp_path: Path, bits: int | None, rank_stabilized: bool
) -> None:
    base = load_base(cached.model_copy(update={"quantization": cached.quantization.model_copy(update={"bits": bits})}))
    settings = LoraConfig(r=8, lora_alpha=24, target_modules=["q_proj", "fc1"], use_rslora=rank_stabilized)
    model = get_peft_model(base, settings)
    monitor = LoraMonitorCallback(model, Run(tmp_path), steps=1, warmup_steps=0, stop=StopRequest())
    state, control = TrainerState(max_steps=9, is_world_process_zero=True), TrainerControl()
    arguments = TrainingArguments(output_dir=str(tmp_path / "x"), use_cpu=True, report_to=[])
    monitor.on_train_begin(arguments, state, control)
    for state.global_step in (1, 2):
        before = full_updates(model)
        for layer in adapted_layers(model).values():
            layer.lora_B["default"].weight.data += 0.01 * torch.randn_like(layer.lora_B["default"].weight)
        monitor.on_step_end(arguments, state, control)
    now = full_updates(model)
    for name, values in rows(Run(tmp_path))[-1]["matrices"].items():
        norm = torch.linalg.matrix_norm(now[name]).item()
        weight = adapted_layers(model)[name].get_base_layer().weight
        frozen = (dequantize_4bit(weight.data, weight.quant_state) if bits else weight).double().norm().item()
        expected = (norm, norm / frozen, rank_by_svd(now[name]), torch.linalg.matrix_norm(now[name] - before[name]))
        assert [values[key] for key in STATISTICS] == pytest.approx([float(value) for value in expected], rel=1e-4)
    assert len(now) == 8


def full_updates(model: PeftModel) -> dict[str, Tensor]:
    layers = adapted_layers(model).items()
    return {name: layer.get_delta_weight("default").detach().double() for name, layer in layers}


def test_norm_of_half_precision_weights_is_float32(cached: Config) -> None:
    quantization = cached.quantization.model_copy(update={"bits": None, "compute_dtype": "float16"})
    model = add_lora(load_base(cached.model_copy(update={"quantization": quantization})), **cached.lora.model_dump())
    for layer in adapted_layers(model).values():
        layer.get_base_layer().weight.data[:] = 100  # its square overflows float16
        assert frozen_norm(layer) == pytest.approx(100 * 128, rel=1e-5)


def test_monitoring_does_not_change_training_and_measures_the_last_step(cached: Config, tmp_path: Path) -> None:
    monitored, plain = Run(tmp_path / "monitored"), Run(tmp_path / "plain")
    result = train_run(with_train(cached, max_steps=5), monitored)
    assert train_run(with_train(cached, max_steps=5, lora_monitor_steps=None), plain).lora == {}
    name = "adapter_model.safetensors"
    assert (monitored.adapter / name).read_bytes() == (plain.adapter / name).read_bytes()
    assert not plain.lora_updates.exists()
    found = rows(monitored)
    assert [row["step"] for row in found] == [0, 2, 4, 5]
    assert all(figures == dict.fromkeys(STATISTICS, 0) for figures in found[0]["matrices"].values())
    weights = load_file(monitored.adapter / name)
    for layer, figures in found[-1]["matrices"].items():
        path = f"base_model.model.language_model.model.decoder.{layer}.lora_"
        update = cached.lora.alpha / cached.lora.r * weights[f"{path}B.weight"] @ weights[f"{path}A.weight"]
        assert figures["norm"] == pytest.approx(update.norm().item(), rel=1e-4)
    ratios = {layer: figures["ratio"] for layer, figures in found[-1]["matrices"].items()}
    assert len(ratios) == 8
    assert result.lora["largest"] == max(ratios, key=lambda layer: ratios[layer])
    assert result.lora["update_ratio_largest"] == max(ratios.values())
    assert result.lora["update_ratio_median"] == pytest.approx(np.median([*ratios.values()]))
    assert result.lora["warnings"] == []


@pytest.mark.parametrize("lora_monitor_steps", [2, 3, 50])
def test_killed_training_resumes_with_the_same_measurements(
    cached: Config, tmp_path: Path, lora_monitor_steps: int
) -> None:
    """Killed after step 6, resumed from step 4."""
    config = with_train(cached, max_steps=8, lora_monitor_steps=lora_monitor_steps)
    whole, killed = Run(tmp_path / "whole"), Run(tmp_path / "killed")
    train_run(config, whole)
    build_sequences, batches = SequenceBuilder.for_training, []

    def interrupt_at_batch_7(self: SequenceBuilder, questions: list[int], *args: object) -> list[ImageSequence]:
        batches.append(questions)
        if len(batches) == 7:
            raise KeyboardInterrupt
        return build_sequences(self, questions, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceBuilder, "for_training", interrupt_at_batch_7)
        with pytest.raises(KeyboardInterrupt):
            train_run(config, killed)
    assert rows(killed)[-1]["step"] == (0 if lora_monitor_steps == 50 else 6)
    shutil.rmtree(killed.checkpoints / "checkpoint-6")
    between_measurements = lora_monitor_steps != 2
    assert (killed.checkpoints / "checkpoint-4" / CHECKPOINT_FILE).exists() == between_measurements
    train_run(config, killed, resume=True)
    assert killed.lora_updates.read_text() == whole.lora_updates.read_text()


def test_monitoring_can_start_on_resume(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    train_run(with_train(cached, lora_monitor_steps=None), run)
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "checkpoint-4")
    train_run(with_train(cached, lora_monitor_steps=1), run, resume=True)
    assert [row["step"] for row in rows(run)] == [2, 3, 4]
    assert [min(figures["change"] for figures in row["matrices"].values()) > 0 for row in rows(run)] == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 1e-4},
        {"learning_rate": 5e-3, "warmup_steps": 0},
        {"learning_rate": 2e-2, "lr_scheduler": "linear"},
        {"learning_rate": 1e-3, "weight_decay": 0.1, "share_prefix": False, "lora_monitor_steps": 1},
    ],
)
def test_healthy_training_has_no_warnings(
    cached: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any]
) -> None:
    """The last measurements are at a learning rate near 0."""
    run = Run(tmp_path / "run")
    result = train_run(with_train(cached, max_steps=24, **settings), run)
    assert result.lora["warnings"] == []
    assert [row["warnings"] for row in rows(run)] == [[]] * len(rows(run))
    assert "since step" not in capsys.readouterr().err


def adapted_with(change: Callable[[PeftModel], None]) -> Callable[..., PeftModel]:
    def adapted(*args: Any, **named: Any) -> PeftModel:
        model = add_lora(*args, **named)
        change(model)
        return model

    return adapted


def test_layer_without_gradient_is_logged_once(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def freeze(model: PeftModel) -> None:
        adapted_layers(model)[FROZEN].lora_B["default"].weight.register_hook(torch.zeros_like)

    monkeypatch.setattr("pipeline.commands.train.add_lora", adapted_with(freeze))
    run = Run(tmp_path / "run")
    result = train_run(with_train(cached, max_steps=12), run)
    (step, warning), *others = [(row["step"], warning) for row in rows(run) for warning in row["warnings"]]
    assert (step, others) == (2, [])
    assert warning.startswith(
        f"{FROZEN} is not changing since step 0: its update is 0 of the frozen weight, the median"
    )
    assert "remove it from lora.target_modules" in warning
    assert result.lora["warnings"] == [warning]
    assert capsys.readouterr().err.count(f"step 2: {warning}") == 1
    assert rows(run)[-1]["matrices"][FROZEN]["norm"] == 0


def test_layer_with_a_hundredfold_learning_rate_is_logged_once(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = StageTwoTrainer.create_optimizer

    def hundredfold(self: StageTwoTrainer, *args: Any) -> Any:
        optimizer = create(self, *args)
        fast = {id(weight) for weight in adapted_layers(self.model)[FROZEN].parameters() if weight.requires_grad}
        group = optimizer.param_groups[0]
        apart = [weight for weight in group["params"] if id(weight) in fast]
        group["params"] = [weight for weight in group["params"] if id(weight) not in fast]
        optimizer.add_param_group({**group, "params": apart, "lr": 100 * group["lr"]})
        return optimizer

    monkeypatch.setattr(StageTwoTrainer, "create_optimizer", hundredfold)
    run = Run(tmp_path / "run")
    train_run(with_train(cached, max_steps=12), run)
    (warning,) = [warning for row in rows(run) for warning in row["warnings"]]
    assert warning.startswith(f"{FROZEN} is diverging since step ")
    assert "try a lower train.learning_rate" in warning


def measurements(
    ratios: list[float | None], changes: list[float | None] | None = None
) -> dict[str, dict[str, float | None]]:
    changes = changes or [1.0] * len(ratios)
    values = [{"norm": ratio, "ratio": ratio, "change": change} for ratio, change in zip(ratios, changes, strict=True)]
    return {f"layers.{number}.fc1": one for number, one in enumerate(values)}


@pytest.mark.parametrize(
    ("before", "now", "anomaly"),
    [
        pytest.param([0.1] * 4, [0.1, 0.2, 0.4, 0.05], None, id="usual differences"),
        pytest.param([0.1] * 4, [0.009, 0.1, 0.1, 0.1], "is not changing", id="far below"),
        pytest.param([0.1] * 4, [1.1, 0.1, 0.1, 0.1], "is diverging", id="far above"),
        pytest.param([1.2] * 4, [1.1, 0.1, 0.1, 0.1], None, id="far above but not growing"),
        pytest.param([1e-4] * 4, [0.05, 1e-4, 1e-4, 1e-4], None, id="far above but small"),
        pytest.param([0.1] * 4, [2.0, 0.01, 0.1, 1.0], None, id="others differ as much"),
        pytest.param([0.1] * 3, [5.0, 0.1, 0.1], None, id="too few others"),
        pytest.param([0.1] * 4, [None, 0.1, 0.1, 0.1], "is not finite", id="not finite"),
        pytest.param([0.1] * 32, [50.0, 20.0, *np.geomspace(0.05, 0.2, 30)], "is diverging", id="two of many"),
    ],
)
def test_anomaly_of_the_first_layer(before: list[float], now: list[float | None], anomaly: str | None) -> None:
    found = [
        warning.partition(" since step 50: ")[0]
        for warning in find_anomalies(measurements(now), measurements(before), 50, after_warmup=True)
    ]
    assert found[:1] == ([f"layers.0.fc1 {anomaly}"] if anomaly else [])


def test_small_update_is_an_anomaly_only_after_warmup() -> None:
    now = measurements([0.001, 0.1, 0.1, 0.1])
    assert not [*find_anomalies(now, measurements([0.0] * 4), 0, after_warmup=False)]
    assert len([*find_anomalies(now, measurements([0.0] * 4), 0, after_warmup=True)]) == 1


def test_unchanged_layer_is_an_anomaly_only_if_others_change() -> None:
    """A learning rate near 0 changes some weights in the last bit and others not at all."""
    ratios = [0.1] * 4
    (warning,) = find_anomalies(
        measurements(ratios, [0.0, 1e-3, 1e-3, 1e-3]), measurements(ratios), 0, after_warmup=False
    )
    assert warning.startswith("layers.0.fc1 is not changing since step 0")
    assert not [
        *find_anomalies(measurements(ratios, [0.0, 1e-9, 1e-9, 1e-9]), measurements(ratios), 0, after_warmup=True)
    ]
    assert not [*find_anomalies(measurements([0.0] * 4, [0.0] * 4), measurements([0.0] * 4), 0, after_warmup=True)]
