"""Validation during training: its metrics, the best adapter, early stopping, and resuming."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import rounding
import torch
from safetensors.torch import load_file
from torch import Tensor

from cache.text import Ragged, TextTable
from pipeline.batches.sequences import ImageSequence, SequenceBuilder, pack
from pipeline.batches.split import load_tokenizer, open_split
from pipeline.blip2.base_model import load_base
from pipeline.blip2.language_model import Blip2LanguageHalf, load_adapter
from pipeline.commands.evaluate import evaluate
from pipeline.commands.train import train_run
from pipeline.common.errors import PipelineError
from pipeline.config import Config
from pipeline.data.examples import DIFFICULT, VQAExample
from pipeline.runs.run import Run
from pipeline.training.validation import Validator, choose_questions

NAME = "adapter_model.safetensors"
DIFFICULT_EXAMPLE = VQAExample("q", Path("1.jpg"), "what?", ("red",) * 10, DIFFICULT)


def with_validation(config: Config, steps: int = 2, max_steps: int = 6, **settings: object) -> Config:
    return config.model_copy(
        update={
            "validation": config.validation.model_copy(update={"steps": steps, **settings}),
            "train": config.train.model_copy(update={"max_steps": max_steps}),
        }
    )


def rows(run: Run) -> list[dict[str, float]]:
    return [json.loads(line) for line in run.validation.read_text().splitlines()]


def accuracies(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Make the validations return these accuracies, in this order."""
    remaining = iter(values)
    monkeypatch.setattr(
        "pipeline.training.validation.Validator.__call__", lambda *_: np.array([next(remaining), 1, 0.5, 1.0])
    )


@pytest.mark.parametrize("bits", [None, 4], ids=["float32", "nf4"])
def test_validation_matches_evaluation_and_does_not_change_training(
    cached: Config, tmp_path: Path, bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With AVX512-BF16, bitsandbytes rounds the scales of 4-bit weights in `evaluate`, as no gradient is needed there.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    cached = cached.model_copy(update={"quantization": cached.quantization.model_copy(update={"bits": bits})})
    validated, plain = Run(tmp_path / "validated"), Run(tmp_path / "plain")
    result = train_run(with_validation(cached, max_steps=5), validated)
    train_run(with_validation(cached, max_steps=5).model_copy(update={"validation": cached.validation}), plain)
    assert [row["step"] for row in rows(validated)] == [2, 4, 5]
    assert rows(validated)[-1]["questions"] == 18
    last = validated.last_adapter if validated.last_adapter.exists() else validated.adapter
    assert (last / NAME).read_bytes() == (plain.adapter / NAME).read_bytes()
    assert rows(validated)[-1]["accuracy"] == pytest.approx(evaluate(plain).accuracy, abs=1e-4)
    builder = open_split(cached, "val")
    model = load_adapter(load_base(cached), plain.adapter)
    with torch.no_grad():
        loss = model(**pack(builder.for_training(range(18)))).loss
    assert rows(validated)[-1]["loss"] == pytest.approx(loss.item(), rel=rounding.FLOAT32)
    assert result.validation["num_validations"] == 3
    assert result.validation["best_accuracy"] == max(row["accuracy"] for row in rows(validated))
    assert all("accuracy" not in json.loads(line) for line in validated.metrics.read_text().splitlines())


def test_loss_is_summed_in_parts_when_out_of_memory(cached: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = with_validation(cached), load_base(cached)
    validator = Validator(open_split(config, "val"), load_tokenizer(config), config.validation, config.evaluate)
    whole = validator(model)
    forward = Blip2LanguageHalf.forward

    def limited_forward(self: Blip2LanguageHalf, query_features: Tensor, *args: object, **named: object) -> object:
        if len(query_features) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, query_features, *args, **named)

    monkeypatch.setattr(Blip2LanguageHalf, "forward", limited_forward)
    assert validator(model) == pytest.approx(whole, rel=1e-4)


def test_best_and_last_adapters_are_kept(cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, short = Run(tmp_path / "whole"), Run(tmp_path / "short")
    accuracies(monkeypatch, [30, 80, 80, 60])
    result = train_run(with_validation(cached, max_steps=8), whole)
    assert (result.validation["best_step"], result.validation["best_accuracy"]) == (4, 80)
    kept, last = load_file(whole.adapter / NAME), load_file(whole.last_adapter / NAME)
    assert any(not torch.equal(kept[name], last[name]) for name in kept)
    assert not (whole.path / "best").exists()
    checkpoint = load_file(whole.checkpoints / "checkpoint-8" / NAME)
    assert all(torch.equal(checkpoint[name], last[name]) for name in last)
    accuracies(monkeypatch, [10, 20, 30, 40])
    train_run(with_validation(cached, max_steps=8), short)
    assert not short.last_adapter.exists(), "the last adapter is the best"


def test_equal_accuracies_are_ranked_by_loss(cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remaining = iter([(50, 0.9), (50, 0.4), (50, 0.6)])
    monkeypatch.setattr(
        "pipeline.training.validation.Validator.__call__",
        lambda *_: np.array([(one := next(remaining))[0], 1, one[1], 1]),
    )
    result = train_run(with_validation(cached, max_steps=6), Run(tmp_path / "run"))
    assert (result.validation["best_step"], result.validation["best_loss"]) == (4, pytest.approx(0.4))


def test_training_stops_early_without_improvement(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies(monkeypatch, [10, 50, 50, 40, 90])
    run = Run(tmp_path / "run")
    result = train_run(with_validation(cached, max_steps=20, patience=2), run)
    assert (result.steps, result.validation["best_step"]) == (8, 4)
    assert [json.loads(line)["step"] for line in run.lora_updates.read_text().splitlines()] == [0, 8]


def test_killed_training_resumes_with_the_same_validations_and_adapter(cached: Config, tmp_path: Path) -> None:
    config = with_validation(cached, steps=1, max_steps=8)
    whole, killed = Run(tmp_path / "whole"), Run(tmp_path / "killed")
    train_run(config, whole)
    build_sequences, batches = SequenceBuilder.for_training, []

    def interrupt(self: SequenceBuilder, questions: list[int], *args: object) -> list[ImageSequence]:
        batches.append(questions)
        if len(batches) == 12:  # in the middle: validations build sequences too
            raise KeyboardInterrupt
        return build_sequences(self, questions, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceBuilder, "for_training", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_run(config, killed)
    assert 0 < len(rows(killed)) < 8
    train_run(config, killed, resume=True)
    without_seconds = [[{**row, "seconds": 0} for row in rows(run)] for run in (whole, killed)]
    assert without_seconds[0] == without_seconds[1]
    assert (whole.adapter / NAME).read_bytes() == (killed.adapter / NAME).read_bytes()


def test_chosen_questions_depend_on_the_seed_and_keep_images_together() -> None:
    def ragged(rows: list[list[int]], dtype: type) -> Ragged:
        return Ragged.from_rows(rows, dtype)

    image_row = np.repeat(np.arange(50), 4)
    targets = [[1] if number % 4 else [] for number in range(200)]
    records = Ragged.from_rows([b"{}"] * 200, np.uint8)
    text = TextTable(records, image_row, ragged([[1]] * 200, np.int32), ragged(targets, np.int32), "", "")
    chosen = choose_questions(text, 30, seed=0)
    assert chosen.tolist() == choose_questions(text, 30, seed=0).tolist()
    assert chosen.tolist() != choose_questions(text, 30, seed=1).tolist()
    assert len(chosen) == 30
    assert set(chosen % 4) == {1, 2, 3}, "questions without an answer are not chosen"
    assert len(set(image_row[chosen])) == 10
    assert len(choose_questions(text, 1000, seed=0)) == 150


def test_unscorable_questions_are_an_error_before_training(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_validation(cached)
    official = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"metric": "official"})})
    with pytest.raises(PipelineError, match=r"set evaluate\.metric=exact"):
        train_run(official, Run(tmp_path / "run"))
    difficult = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"metric": "a-okvqa"})})
    monkeypatch.setattr("pipeline.training.validation.VQAExample.from_record", lambda _: DIFFICULT_EXAMPLE)
    with pytest.raises(PipelineError, match=r"none of the chosen questions of val has an answer .*=a-okvqa counts"):
        train_run(difficult, Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_resume_refuses_other_generation_settings_with_validation_only(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = Run(tmp_path / "run"), with_validation(cached)
    accuracies(monkeypatch, [10])
    with pytest.raises(StopIteration):
        train_run(config, run)
    other = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"max_new_tokens": 3})})
    with pytest.raises(PipelineError, match=r"other settings:\n  evaluate.max_new_tokens: 3, not 10$"):
        train_run(other, run, resume=True)
    unvalidated = [one.model_copy(update={"validation": cached.validation}) for one in (config, other)]
    assert unvalidated[0].differences(unvalidated[1]) == []


def test_best_adapter_saved_after_the_last_checkpoint_is_saved_again(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between a validation and the next checkpoint, or while the last adapter is moved into place."""
    config, run = with_validation(cached, steps=1, max_steps=3), Run(tmp_path / "run")
    config = config.model_copy(update={"train": config.train.model_copy(update={"save_steps": 100})})
    accuracies(monkeypatch, [10])
    with pytest.raises(StopIteration):
        train_run(config, run)
    assert (run.best_adapter(1) / NAME).exists()
    assert run.last_checkpoint() is None
    shutil.copytree(run.best_adapter(1), run.last_adapter)
    accuracies(monkeypatch, [10, 20, 15])
    assert train_run(config, run, resume=True).validation["best_step"] == 2
    last = load_file(run.checkpoints / "checkpoint-3" / NAME)
    assert all(torch.equal(value, last[name]) for name, value in load_file(run.last_adapter / NAME).items())


@pytest.mark.parametrize("patience", [2, None])
def test_training_killed_after_its_last_step_resumes_without_another_step(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: int | None
) -> None:
    """Killed between the last checkpoint and the final adapter, after all steps or after early stopping."""
    config = with_validation(cached, max_steps=20 if patience else 6, patience=patience)
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"lr_scheduler": "constant_with_warmup"})}
    )
    run = Run(tmp_path / "run")
    accuracies(monkeypatch, [50, 40, 30])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.commands.train._save_adapter", lambda *_: exit())
        with pytest.raises(SystemExit):
            train_run(config, run)
    validations = rows(run)
    accuracies(monkeypatch, [])
    result = train_run(config, run, resume=True)
    assert (result.steps, result.validation["best_step"]) == (6, 2)
    assert rows(run) == validations
    last, checkpoint = load_file(run.last_adapter / NAME), load_file(run.checkpoints / "checkpoint-6" / NAME)
    assert all(torch.equal(checkpoint[name], last[name]) for name in last)
