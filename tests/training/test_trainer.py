"""Optimizer steps: order, micro-batches, lack of memory, nonfinite steps, and several ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rounding
import torch
from processes import wait_for
from ranks import FREED, report_group_destruction, run_ranks, running_ranks
from rounding import relative_difference
from runs import with_train
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer

import pipeline.training.micro_batches
from pipeline.batches.sequences import ImageSequence, SequenceBuilder, pack
from pipeline.batches.split import open_split
from pipeline.blip2.base_model import load_base
from pipeline.blip2.language_model import Blip2LanguageHalf, add_lora
from pipeline.commands.train import train_run
from pipeline.common.errors import PipelineError
from pipeline.config import Config
from pipeline.runs.run import Run
from pipeline.training.trainer import MAX_CONSECUTIVE_SKIPS, StageTwoTrainer

IMAGE_ROW = np.repeat(np.arange(40), 5)
QUESTIONS = np.arange(200)


def adapter_of(run: Run) -> dict[str, Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(relative_difference(a[name], b[name]) for name in b if b[name].norm() > 0)


def test_step_does_not_depend_on_its_split(cached: Config, tmp_path: Path) -> None:
    runs = {}
    for name, settings in {"auto": {}, "2": {"micro_batch": 2}, "apart": {"share_prefix": False}}.items():
        runs[name] = Run(tmp_path / name)
        whole = with_train(cached, batch_size=54, max_steps=6, **settings)  # all questions in each step
        train_run(whole, runs[name])
    assert difference(adapter_of(runs["2"]), adapter_of(runs["auto"])) < rounding.FLOAT32
    assert difference(adapter_of(runs["apart"]), adapter_of(runs["auto"])) < rounding.FLOAT32


def out_of_memory_beyond(max_sequences: int, computed: list[int]) -> Callable[..., object]:
    forward = Blip2LanguageHalf.forward

    def limited(self: Blip2LanguageHalf, query_features: Tensor, *args: object, **named: object) -> object:
        computed.append(len(query_features))
        if len(query_features) > max_sequences:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, query_features, *args, **named)

    return limited


def test_out_of_memory_halves_micro_batches_and_keeps_the_step(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_train(cached, batch_size=54, max_steps=5)
    whole, halved = Run(tmp_path / "whole"), Run(tmp_path / "halved")
    train_run(config, whole)
    computed: list[int] = []
    monkeypatch.setattr(Blip2LanguageHalf, "forward", out_of_memory_beyond(5, computed))
    capsys.readouterr()
    assert train_run(config, halved).steps == 5
    warnings = [line for line in capsys.readouterr().err.splitlines() if "Out of memory" in line]
    assert len(warnings) == 2, warnings  # 18 sequences, 9, 4 or 5
    assert "Out of memory at step 1 with a micro-batch of " in warnings[0]
    assert "Retrying; later steps use micro-batches of " in warnings[0]
    assert "The effective batch size does not change" in warnings[0]
    assert max(computed) == 18
    assert difference(adapter_of(halved), adapter_of(whole)) < rounding.FLOAT32


def test_out_of_memory_with_one_sequence_is_an_error_with_advice(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Blip2LanguageHalf, "forward", out_of_memory_beyond(0, []))
    with pytest.raises(
        PipelineError, match=r"Out of memory at step 1 with .* of 3 questions.*gradient_checkpointing=true"
    ):
        train_run(with_train(cached, micro_batch=3), Run(tmp_path / "run"))


def test_gradient_checkpointing_is_enabled_only_if_one_image_does_not_fit(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run")
    monkeypatch.setattr(pipeline.training.micro_batches, "free_memory_bytes", lambda device: 10_000)
    assert train_run(cached, run).steps == 4
    assert "enabling gradient checkpointing" in capsys.readouterr().err
    monkeypatch.undo()
    default = Run(tmp_path / "default")
    train_run(cached, default)
    assert "gradient checkpointing" not in capsys.readouterr().err
    assert difference(adapter_of(run), adapter_of(default)) < rounding.FLOAT32


def test_nonfinite_steps_are_skipped_and_counted(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_sequences, batches = SequenceBuilder.for_training, []

    def break_second_batch(self: SequenceBuilder, *args: object) -> list[ImageSequence]:
        batches.append(args)
        sequences = build_sequences(self, *args)
        if len(batches) == 2:
            sequences[0].query_features[:] = float("nan")
        return sequences

    monkeypatch.setattr(SequenceBuilder, "for_training", break_second_batch)
    run = Run(tmp_path / "run")
    result = train_run(with_train(cached, on_nonfinite="skip"), run)
    assert (result.steps, result.skipped_steps) == (4, 1)
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 1]
    assert all(torch.isfinite(weight).all() for weight in adapter_of(run).values())
    batches.clear()
    with pytest.raises(PipelineError, match=r"training diverged at step 2: loss nan.*on_nonfinite=skip"):
        train_run(cached, Run(tmp_path / "stopped"))


def test_consecutive_nonfinite_steps_stop_the_training(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even with train.on_nonfinite=skip."""
    build_sequences = SequenceBuilder.for_training

    def broken(self: SequenceBuilder, *args: object) -> list[ImageSequence]:
        sequences = build_sequences(self, *args)
        sequences[0].query_features[:] = float("nan")
        return sequences

    monkeypatch.setattr(SequenceBuilder, "for_training", broken)
    run = Run(tmp_path / "run")
    message = f"training diverged at step {MAX_CONSECUTIVE_SKIPS}: {MAX_CONSECUTIVE_SKIPS} steps in a row were skipped"
    with pytest.raises(PipelineError, match=message):
        train_run(with_train(cached, batch_size=4, max_steps=100, on_nonfinite="skip"), run)


def in_float16(config: Config, monkeypatch: pytest.MonkeyPatch, **scaler: float) -> tuple[Config, list[Trainer]]:
    """Use a gradient scaler, as accelerate does on a GPU only; also return the trainers that are created later."""
    initialize, trainers = StageTwoTrainer.__init__, []

    def with_scaler(self: StageTwoTrainer, *args: Any) -> None:
        initialize(self, *args)
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", **scaler)
        trainers.append(self)

    monkeypatch.setattr(StageTwoTrainer, "__init__", with_scaler)
    quantization = config.quantization.model_copy(update={"compute_dtype": "float16"})
    return config.model_copy(update={"quantization": quantization}), trainers


def test_steps_skipped_by_the_float16_scaler_are_counted_and_keep_the_learning_rate(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, trainers = in_float16(cached, monkeypatch, init_scale=2.0**50, backoff_factor=2.0**-10)
    run = Run(tmp_path / "run")
    result = train_run(with_train(config, max_steps=8), run)
    skipped = result.skipped_steps
    assert 0 < skipped < 8
    assert trainers[0].accelerator.scaler.get_scale() == 2.0 ** (50 - 10 * skipped)
    assert trainers[0].lr_scheduler.last_epoch == 8 - skipped
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows] == [*range(1, skipped + 1), *[skipped] * (8 - skipped)]
    assert all(torch.isfinite(weight).all() for weight in adapter_of(run).values())


def test_float16_scaler_without_a_usable_scale_stops_the_training(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = in_float16(cached, monkeypatch, init_scale=2.0**120, backoff_factor=0.99)
    with pytest.raises(PipelineError, match=r"training diverged at step 20: 20 steps in a row .* float16, scale now"):
        train_run(with_train(config, max_steps=100), Run(tmp_path / "run"))


@pytest.mark.parametrize("share_prefix", [True, False])
def test_logits_are_computed_only_at_labels(cached: Config, share_prefix: bool) -> None:
    model = add_lora(load_base(cached), **cached.lora.model_dump())
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    sequences = open_split(cached, "train").for_training(range(30), share_prefix)
    model(**pack(sequences)).loss.backward()
    labels = sum(len(sequence.tree.labels) for sequence in sequences)
    assert shapes == [(labels, model.config.text_config.vocab_size)]


def test_time_waiting_for_batches_is_logged(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    train_run(cached, run)
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert all(0 <= row["loader_wait"] < 1 for row in rows)


def test_two_ranks_give_the_adapter_of_one(cached: Config, tmp_path: Path) -> None:
    """54 questions in batches of 53: the second batch has no question for one of the ranks."""
    config = tmp_path / "config.yaml"
    config.write_text(with_train(cached, batch_size=53, max_steps=4, logging_steps=3, output_dir=tmp_path).to_yaml())
    alone, both = Run(tmp_path / "alone"), Run(tmp_path / "both")
    losses = []
    for run, size in ((alone, 1), (both, 2)):
        words = ("train", config, "--name", run.path.name, "--json")
        ended = run_ranks(tmp_path, size, *words, prepare=report_group_destruction)
        assert [one.status for one in ended] == [0] * size, ended[-1].err
        assert not any(FREED in one.err for one in ended)
        assert json.loads(ended[0].out)["steps"] == 4
        losses.append(json.loads(ended[0].out)["train_loss"])
        assert not ended[-1].out or size == 1
    assert difference(adapter_of(both), adapter_of(alone)) < rounding.FLOAT32
    assert losses[1] == pytest.approx(losses[0], rel=rounding.FLOAT32), "the step after the last log included"
    assert len(both.metrics.read_text().splitlines()) == len(alone.metrics.read_text().splitlines())
    assert len(both.lora_updates.read_text().splitlines()) == 2, "only rank 0 measures"


def test_training_ends_when_a_rank_dies_and_can_be_resumed(cached: Config, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(with_train(cached, max_steps=100_000, output_dir=tmp_path).to_yaml())
    run = Run(tmp_path / "run")
    with running_ranks(tmp_path, 2, "train", config, "--name", "run") as processes:
        wait_for(run.last_checkpoint, processes[0])
        processes[1].process.kill()
        first = processes[0].wait()
    error = first.error()
    assert "another rank exited early" in error
    assert f"pipe train {run.path} --resume" in error
    assert run.last_checkpoint()


def test_divergence_on_several_ranks_is_logged_by_rank_0(cached: Config, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(with_train(cached, learning_rate=1e30, warmup_steps=0, output_dir=tmp_path).to_yaml())
    first, second = run_ranks(tmp_path, 2, "train", config, "--name", "run")
    assert "training diverged at step 2" in first.error()
    assert (second.status, second.out, second.err) == (1, "", "")
