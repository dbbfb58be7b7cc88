"""Accuracy while training goes on: what is looked at, what is kept, when training ends."""

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
from pipeline.batches.assemble import load_base, load_tokenizer, open_split
from pipeline.batches.sequences import ImageSequence, SequenceBuilder, pack
from pipeline.blip2.language_model import Blip2LanguageHalf, load_adapter
from pipeline.commands.evaluate import evaluate
from pipeline.commands.train import train
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
    """The looks see these, one after the other."""
    left = iter(values)
    monkeypatch.setattr(
        "pipeline.training.validation.Validator.__call__", lambda *_: np.array([next(left), 1, 0.5, 1.0])
    )


@pytest.mark.parametrize("bits", [None, 4], ids=["float32", "nf4"])
def test_a_look_sees_what_evaluation_sees_and_changes_no_training(
    cached: Config, tmp_path: Path, bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With bfloat16 instructions bitsandbytes rounds the scales of 4-bit weights in `evaluate`, which trains no more.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    cached = cached.model_copy(update={"quantization": cached.quantization.model_copy(update={"bits": bits})})
    looked, plain = Run(tmp_path / "looked"), Run(tmp_path / "plain")
    summary = train(with_validation(cached, max_steps=5), looked)
    train(with_validation(cached, max_steps=5).model_copy(update={"validation": cached.validation}), plain)
    assert [row["step"] for row in rows(looked)] == [2, 4, 5]
    assert rows(looked)[-1]["questions"] == 18
    last = looked.last_adapter if looked.last_adapter.exists() else looked.adapter
    assert (last / NAME).read_bytes() == (plain.adapter / NAME).read_bytes()
    assert rows(looked)[-1]["accuracy"] == pytest.approx(evaluate(plain).accuracy, abs=1e-4)
    builder = open_split(cached, "val")
    model = load_adapter(load_base(cached), plain.adapter)
    with torch.no_grad():
        loss = model(**pack(builder.for_training(range(18)))).loss
    assert rows(looked)[-1]["loss"] == pytest.approx(loss.item(), rel=rounding.FLOAT32)
    assert summary["validation"]["num_validations"] == 3
    assert summary["validation"]["best_accuracy"] == max(row["accuracy"] for row in rows(looked))
    assert all("accuracy" not in json.loads(line) for line in looked.metrics.read_text().splitlines())


def test_where_memory_is_short_the_loss_is_summed_in_parts(cached: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = with_validation(cached), load_base(cached)
    validator = Validator(open_split(config, "val"), load_tokenizer(config), config.validation, config.evaluate)
    whole = validator(model)
    forward = Blip2LanguageHalf.forward

    def short(self: Blip2LanguageHalf, query_features: Tensor, *args: object, **named: object) -> object:
        if len(query_features) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, query_features, *args, **named)

    monkeypatch.setattr(Blip2LanguageHalf, "forward", short)
    assert validator(model) == pytest.approx(whole, rel=1e-4)


def test_the_best_adapter_is_kept_and_the_last_beside_it(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, short = Run(tmp_path / "whole"), Run(tmp_path / "short")
    accuracies(monkeypatch, [30, 80, 80, 60])
    summary = train(with_validation(cached, max_steps=8), whole)
    assert (summary["validation"]["best_step"], summary["validation"]["best_accuracy"]) == (4, 80)
    kept, last = load_file(whole.adapter / NAME), load_file(whole.last_adapter / NAME)
    assert any(not torch.equal(kept[name], last[name]) for name in kept)
    assert not (whole.path / "best").exists()
    checkpoint = load_file(whole.checkpoints / "checkpoint-8" / NAME)
    assert all(torch.equal(checkpoint[name], last[name]) for name in last)
    accuracies(monkeypatch, [10, 20, 30, 40])
    train(with_validation(cached, max_steps=8), short)
    assert not short.last_adapter.exists(), "the last is the best"


def test_of_equal_accuracies_the_lower_loss_is_the_better(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter([(50, 0.9), (50, 0.4), (50, 0.6)])
    monkeypatch.setattr(
        "pipeline.training.validation.Validator.__call__", lambda *_: np.array([(one := next(left))[0], 1, one[1], 1])
    )
    summary = train(with_validation(cached, max_steps=6), Run(tmp_path / "run"))
    assert (summary["validation"]["best_step"], summary["validation"]["best_loss"]) == (4, pytest.approx(0.4))


def test_training_ends_when_it_gets_no_better(cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies(monkeypatch, [10, 50, 50, 40, 90])
    run = Run(tmp_path / "run")
    summary = train(with_validation(cached, max_steps=20, patience=2), run)
    assert (summary["steps"], summary["validation"]["best_step"]) == (8, 4)
    assert [json.loads(line)["step"] for line in run.watch.read_text().splitlines()] == [0, 8]


def test_a_killed_training_looks_and_keeps_as_if_never_stopped(cached: Config, tmp_path: Path) -> None:
    config = with_validation(cached, steps=1, max_steps=8)
    whole, killed = Run(tmp_path / "whole"), Run(tmp_path / "killed")
    train(config, whole)
    build_sequences, batches = SequenceBuilder.for_training, []

    def stop(self: SequenceBuilder, questions: list[int], *how: object) -> list[ImageSequence]:
        batches.append(questions)
        if len(batches) == 12:  # in the middle: each look lays out questions too
            raise KeyboardInterrupt
        return build_sequences(self, questions, *how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceBuilder, "for_training", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, killed)
    assert 0 < len(rows(killed)) < 8
    train(config, killed, resume=True)
    drop_seconds = [[{**row, "seconds": 0} for row in rows(run)] for run in (whole, killed)]
    assert drop_seconds[0] == drop_seconds[1]
    assert (whole.adapter / NAME).read_bytes() == (killed.adapter / NAME).read_bytes()


def test_the_questions_are_the_same_each_time_and_keep_images_whole() -> None:
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
    assert set(chosen % 4) == {1, 2, 3}, "those without an answer are not asked"
    assert len(set(image_row[chosen])) == 10
    assert len(choose_questions(text, 1000, seed=0)) == 150


def test_what_cannot_be_scored_is_told_before_training(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_validation(cached)
    official = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"metric": "official"})})
    with pytest.raises(PipelineError, match=r"set evaluate\.metric=exact"):
        train(official, Run(tmp_path / "run"))
    difficult = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"metric": "a-okvqa"})})
    monkeypatch.setattr("pipeline.training.validation.VQAExample.from_record", lambda _: DIFFICULT_EXAMPLE)
    with pytest.raises(PipelineError, match=r"none has an answer .*=a-okvqa counts"):
        train(difficult, Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_training_is_not_gone_on_with_by_another_count_of_its_looks(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = Run(tmp_path / "run"), with_validation(cached)
    accuracies(monkeypatch, [10])
    with pytest.raises(StopIteration):
        train(config, run)
    other = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"max_new_tokens": 3})})
    with pytest.raises(PipelineError, match=r"other settings:\n  evaluate.max_new_tokens: 3, not 10$"):
        train(other, run, resume=True)
    unlooked = [one.model_copy(update={"validation": cached.validation}) for one in (config, other)]
    assert unlooked[0].differences(unlooked[1]) == []


def test_an_adapter_kept_behind_the_last_checkpoint_is_kept_again(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between a look and the checkpoint behind it, or while the last adapter is being put in its place."""
    config, run = with_validation(cached, steps=1, max_steps=3), Run(tmp_path / "run")
    config = config.model_copy(update={"train": config.train.model_copy(update={"save_steps": 100})})
    accuracies(monkeypatch, [10])
    with pytest.raises(StopIteration):
        train(config, run)
    assert (run.best(1) / NAME).exists()
    assert run.last_checkpoint() is None
    shutil.copytree(run.best(1), run.last_adapter)
    accuracies(monkeypatch, [10, 20, 15])
    assert train(config, run, resume=True)["validation"]["best_step"] == 2
    last = load_file(run.checkpoints / "checkpoint-3" / NAME)
    assert all(torch.equal(value, last[name]) for name, value in load_file(run.last_adapter / NAME).items())


@pytest.mark.parametrize("patience", [2, None])
def test_a_training_killed_when_all_its_steps_were_done_takes_no_more(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: int | None
) -> None:
    """Between its last checkpoint and its adapter, at its last step or where it got no better."""
    config = with_validation(cached, max_steps=20 if patience else 6, patience=patience)
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"lr_scheduler": "constant_with_warmup"})}
    )
    run = Run(tmp_path / "run")
    accuracies(monkeypatch, [50, 40, 30])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.commands.train._save", lambda *_: exit())
        with pytest.raises(SystemExit):
            train(config, run)
    looks = rows(run)
    accuracies(monkeypatch, [])
    summary = train(config, run, resume=True)
    assert (summary["steps"], summary["validation"]["best_step"]) == (6, 2)
    assert rows(run) == looks
    last, checkpoint = load_file(run.last_adapter / NAME), load_file(run.checkpoints / "checkpoint-6" / NAME)
    assert all(torch.equal(checkpoint[name], last[name]) for name in last)
