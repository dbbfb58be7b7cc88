"""What an optimizer step is made of: order, micro-batches, and what happens when one does not go well."""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rounding
import torch
from processes import wait_for
from ranks import FREED, forbid_freeing_the_group, team, together
from rounding import relative_difference
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer

import pipeline.training.trainer
from pipeline.batches.sampler import QuestionBatchSampler
from pipeline.batches.sequences import ImageSequence, SequenceBuilder, micro_batches, pack
from pipeline.batches.split import open_split
from pipeline.blip2.base_model import load_base
from pipeline.blip2.language_model import Blip2LanguageHalf, add_lora
from pipeline.commands.train import train
from pipeline.common.errors import PipelineError
from pipeline.config import Config
from pipeline.runs.run import Run
from pipeline.training.trainer import MAX_CONSECUTIVE_SKIPS, StageTwoTrainer

IMAGE_ROW = np.repeat(np.arange(40), 5)
QUESTIONS = np.arange(200)


def with_train(config: Config, **settings: object) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=settings)})


def adapter_of(run: Run) -> dict[str, Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(relative_difference(a[name], b[name]) for name in b if b[name].norm() > 0)


def test_an_epoch_has_every_question_once_and_images_together() -> None:
    batches = list(QuestionBatchSampler(QUESTIONS, 16, seed=0, image_row=IMAGE_ROW))
    assert [len(batch) for batch in batches] == [16] * 12 + [8]
    order = [question for batch in batches for question in batch]
    assert sorted(order) == QUESTIONS.tolist()
    rows = IMAGE_ROW[order]
    assert np.count_nonzero(np.diff(rows)) == 39, "each image's questions stand together"
    assert rows.tolist() != sorted(rows.tolist())


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    order = QuestionBatchSampler(QUESTIONS, 16, seed=0)
    first = list(order)
    assert list(order) == first
    order.set_epoch(1)
    assert list(order) != first
    assert list(QuestionBatchSampler(QUESTIONS, 16, seed=1)) != first
    assert list(QuestionBatchSampler(QUESTIONS, 16, seed=0)) == first


@pytest.mark.parametrize("processes", [2, 3, 9])
def test_processes_share_every_batch(processes: int) -> None:
    shares = [
        list(QuestionBatchSampler(QUESTIONS, 16, 0, IMAGE_ROW, process, processes)) for process in range(processes)
    ]
    together = [list(chain(*batch)) for batch in zip(*shares, strict=True)]
    assert together == list(QuestionBatchSampler(QUESTIONS, 16, 0, IMAGE_ROW))


def nodes(sequence: ImageSequence) -> int:
    return sequence.num_tokens


@pytest.mark.parametrize("most", [1, 60, 100, 10_000])
def test_micro_batches_keep_to_their_size_and_lose_nothing(cached: Config, most: int) -> None:
    sequences = open_split(cached, "train").for_training(range(54))
    groups = micro_batches(sequences, nodes, most)
    assert sorted(map(id, chain(*groups))) == sorted(map(id, sequences))
    assert all(len(group) == 1 or sum(map(nodes, group)) <= most for group in groups)
    assert len(groups) == {1: 18, 10_000: 1}.get(most, len(groups))


def test_an_image_with_many_questions_becomes_several_sequences(cached: Config) -> None:
    builder = open_split(cached, "train")
    assert [one.num_questions for one in builder.for_training([0, 1, 2, 3, 4, 5], max_questions=2)] == [2, 1, 2, 1]
    assert [one.num_questions for one in builder.for_training([0, 3, 1], share_prefix=False)] == [1, 1, 1]


def test_the_step_is_the_same_however_it_is_split(cached: Config, tmp_path: Path) -> None:
    runs = {}
    for name, settings in {"auto": {}, "2": {"micro_batch": 2}, "apart": {"share_prefix": False}}.items():
        runs[name] = Run(tmp_path / name)
        whole = with_train(cached, batch_size=54, max_steps=6, **settings)  # all questions in each step
        train(whole, runs[name])
    assert difference(adapter_of(runs["2"]), adapter_of(runs["auto"])) < rounding.FLOAT32
    assert difference(adapter_of(runs["apart"]), adapter_of(runs["auto"])) < rounding.FLOAT32


def out_of_memory_beyond(most: int, computed: list[int]) -> Callable[..., object]:
    forward = Blip2LanguageHalf.forward

    def limited(self: Blip2LanguageHalf, query_features: Tensor, *args: object, **named: object) -> object:
        computed.append(len(query_features))
        if len(query_features) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, query_features, *args, **named)

    return limited


def test_out_of_memory_halves_the_micro_batch_and_loses_no_step(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_train(cached, batch_size=54, max_steps=5)
    whole, halved = Run(tmp_path / "whole"), Run(tmp_path / "halved")
    train(config, whole)
    computed: list[int] = []
    monkeypatch.setattr(Blip2LanguageHalf, "forward", out_of_memory_beyond(5, computed))
    capsys.readouterr()
    assert train(config, halved)["steps"] == 5
    told = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert len(told) == 2, told  # 18 sequences, 9, 4 or 5
    assert "out of memory at step 1 with" in told[0]
    assert "the effective batch stays as it is" in told[0]
    assert max(computed) == 18
    assert difference(adapter_of(halved), adapter_of(whole)) < rounding.FLOAT32


def test_where_not_one_sequence_fits_it_says_what_to_try(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Blip2LanguageHalf, "forward", out_of_memory_beyond(0, []))
    with pytest.raises(PipelineError, match=r"out of memory at step 1 with 3 questions .*gradient_checkpointing=true"):
        train(with_train(cached, micro_batch=3), Run(tmp_path / "run"))


def test_gradient_checkpointing_is_chosen_only_if_one_image_does_not_fit(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run")
    monkeypatch.setattr(pipeline.training.trainer, "free_memory_bytes", lambda device: 10_000)
    assert train(cached, run)["steps"] == 4
    assert "gradient checkpointing is switched on" in capsys.readouterr().err
    monkeypatch.undo()
    usual = Run(tmp_path / "usual")
    train(cached, usual)
    assert "gradient checkpointing" not in capsys.readouterr().err
    assert difference(adapter_of(run), adapter_of(usual)) < rounding.FLOAT32


def test_steps_that_are_not_finite_are_left_out_and_counted(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_sequences, batches = SequenceBuilder.for_training, []

    def second_is_broken(self: SequenceBuilder, *args: object) -> list[ImageSequence]:
        batches.append(args)
        sequences = build_sequences(self, *args)
        if len(batches) == 2:
            sequences[0].query_features[:] = float("nan")
        return sequences

    monkeypatch.setattr(SequenceBuilder, "for_training", second_is_broken)
    run = Run(tmp_path / "run")
    summary = train(with_train(cached, on_nonfinite="skip"), run)
    assert (summary["steps"], summary["skipped_steps"]) == (4, 1)
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 1]
    assert all(torch.isfinite(weight).all() for weight in adapter_of(run).values())
    batches.clear()
    with pytest.raises(PipelineError, match=r"training diverged at step 2: loss nan.*on_nonfinite=skip"):
        train(cached, Run(tmp_path / "stopped"))


def test_a_run_of_steps_that_are_not_finite_stops_the_training(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is trained then, whatever is to be done about a single one."""
    build_sequences = SequenceBuilder.for_training

    def broken(self: SequenceBuilder, *args: object) -> list[ImageSequence]:
        sequences = build_sequences(self, *args)
        sequences[0].query_features[:] = float("nan")
        return sequences

    monkeypatch.setattr(SequenceBuilder, "for_training", broken)
    run = Run(tmp_path / "run")
    told = f"training diverged at step {MAX_CONSECUTIVE_SKIPS}: {MAX_CONSECUTIVE_SKIPS} steps in a row were skipped"
    with pytest.raises(PipelineError, match=told):
        train(with_train(cached, batch_size=4, max_steps=100, on_nonfinite="skip"), run)


def in_float16(config: Config, monkeypatch: pytest.MonkeyPatch, **scaler: float) -> tuple[Config, list[Trainer]]:
    """As on a GPU: accelerate makes no scaler on a CPU. Also gives where the trainer will be."""
    initialize, trainers = StageTwoTrainer.__init__, []

    def with_scaler(self: StageTwoTrainer, *args: Any) -> None:
        initialize(self, *args)
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", **scaler)
        trainers.append(self)

    monkeypatch.setattr(StageTwoTrainer, "__init__", with_scaler)
    quantization = config.quantization.model_copy(update={"compute_dtype": "float16"})
    return config.model_copy(update={"quantization": quantization}), trainers


def test_steps_that_a_float16_scaler_skips_are_counted_and_the_schedule_waits(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, trainers = in_float16(cached, monkeypatch, init_scale=2.0**50, backoff_factor=2.0**-10)
    run = Run(tmp_path / "run")
    summary = train(with_train(config, max_steps=8), run)
    skipped = summary["skipped_steps"]
    assert 0 < skipped < 8
    assert trainers[0].accelerator.scaler.get_scale() == 2.0 ** (50 - 10 * skipped)
    assert trainers[0].lr_scheduler.last_epoch == 8 - skipped
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows] == [*range(1, skipped + 1), *[skipped] * (8 - skipped)]
    assert all(torch.isfinite(weight).all() for weight in adapter_of(run).values())


def test_a_float16_scaler_that_finds_no_scale_stops_the_training(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = in_float16(cached, monkeypatch, init_scale=2.0**120, backoff_factor=0.99)
    with pytest.raises(PipelineError, match=r"training diverged at step 20: 20 steps in a row .* float16, scale now"):
        train(with_train(config, max_steps=100), Run(tmp_path / "run"))


@pytest.mark.parametrize("share_prefix", [True, False])
def test_logits_are_computed_at_the_labels_alone(cached: Config, share_prefix: bool) -> None:
    model = add_lora(load_base(cached), **cached.lora.model_dump())
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    sequences = open_split(cached, "train").for_training(range(30), share_prefix)
    model(**pack(sequences)).loss.backward()
    labels = sum(len(sequence.tree.labels) for sequence in sequences)
    assert shapes == [(labels, model.config.text_config.vocab_size)]


def test_time_spent_waiting_for_batches_is_logged(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    train(cached, run)
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert all(0 <= row["loader_wait"] < 1 for row in rows)


def test_two_processes_give_the_adapter_of_one(cached: Config, tmp_path: Path) -> None:
    """54 questions in batches of 53: of the second there is nothing for one of the two."""
    config = tmp_path / "config.yaml"
    config.write_text(with_train(cached, batch_size=53, max_steps=4, logging_steps=3, output_dir=tmp_path).to_yaml())
    alone, both = Run(tmp_path / "alone"), Run(tmp_path / "both")
    losses = []
    for run, size in ((alone, 1), (both, 2)):
        words = ("train", config, "--name", run.path.name, "--json")
        ended = together(tmp_path, size, *words, prepare=forbid_freeing_the_group)
        assert [one.status for one in ended] == [0] * size, ended[-1].err
        assert not any(FREED in one.err for one in ended)
        assert json.loads(ended[0].out)["steps"] == 4
        losses.append(json.loads(ended[0].out)["train_loss"])
        assert not ended[-1].out or size == 1
    assert difference(adapter_of(both), adapter_of(alone)) < rounding.FLOAT32
    assert losses[1] == pytest.approx(losses[0], rel=rounding.FLOAT32), "the step behind the last log included"
    assert len(both.metrics.read_text().splitlines()) == len(alone.metrics.read_text().splitlines())
    assert len(both.watch.read_text().splitlines()) == 2, "process 0 alone looks"


def test_a_process_that_dies_ends_the_training_of_the_others_and_it_can_be_resumed(
    cached: Config, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(with_train(cached, max_steps=100_000, output_dir=tmp_path).to_yaml())
    run = Run(tmp_path / "run")
    with team(tmp_path, 2, "train", config, "--name", "run") as processes:
        wait_for(run.last_checkpoint, processes[0])
        processes[1].process.kill()
        first = processes[0].ended()
    told = first.error()
    assert "another rank exited early" in told
    assert f"pipe train {run.path} --resume" in told
    assert run.last_checkpoint()


def test_a_training_that_diverges_in_several_processes_is_told_by_the_first(cached: Config, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(with_train(cached, learning_rate=1e30, warmup_steps=0, output_dir=tmp_path).to_yaml())
    first, second = together(tmp_path, 2, "train", config, "--name", "run")
    assert "training diverged at step 2" in first.error()
    assert (second.status, second.out, second.err) == (1, "", "")
