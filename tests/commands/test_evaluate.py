"""Evaluation: its files, its answers, and the errors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from data_set import write_config
from torch import OutOfMemoryError

import pipeline.answers.generation
from pipeline.answers.generation import answer_questions
from pipeline.batches.sequences import pack_prompts
from pipeline.batches.split import load_tokenizer, open_split
from pipeline.blip2.base_model import load_base
from pipeline.blip2.language_model import Blip2LanguageHalf
from pipeline.cli import main
from pipeline.commands.evaluate import evaluate
from pipeline.commands.precompute import precompute
from pipeline.commands.train import train_run
from pipeline.common.errors import ConfigError, PipelineError
from pipeline.config import PRESETS, Config, load_config
from pipeline.runs.run import Run, RunLike


@pytest.fixture(scope="module")
def run(cached: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = Run(tmp_path_factory.mktemp("evaluated") / "run")
    train_run(cached, folder)
    return folder


def test_summary_is_written_to_the_run_with_and_without_adapter(run: Run) -> None:
    for with_adapter in True, False:
        summary = evaluate(run, with_adapter=with_adapter)
        assert json.loads(run.evaluation("val", with_adapter).read_text()) == summary.to_dict()
        assert summary.adapter is with_adapter
        low, high = summary.accuracy_interval or (0, 0)
        assert low <= (summary.accuracy or -1) <= high
    assert {path.name for path in run.path.iterdir()} >= {
        "results-val.json", "predictions-val.jsonl", "evaluation-val.json", "mistakes-val.jsonl",
        "results-val-no-adapter.json", "predictions-val-no-adapter.jsonl", "evaluation-val-no-adapter.json",
        "mistakes-val-no-adapter.jsonl",
    }  # fmt: skip


def test_predictions_have_accuracies_in_the_order_of_the_split(run: Run) -> None:
    summary = evaluate(run)
    predictions = [json.loads(line) for line in run.predictions("val", True).read_text().splitlines()]
    results = json.loads(Path(summary.results).read_text())
    assert [{key: row[key] for key in ("question_id", "answer")} for row in predictions] == results
    assert sum(row["accuracy"] for row in predictions) / len(predictions) == pytest.approx(summary.accuracy)
    assert all(0 <= row["probability"] <= 1 for row in predictions)


def test_mistakes_are_sorted_by_probability(run: Run) -> None:
    summary = evaluate(run)
    mistakes = [json.loads(line) for line in Path(summary.mistakes).read_text().splitlines()]
    answers = {row["question_id"]: row["answer"] for row in json.loads(Path(summary.results).read_text())}
    assert len(mistakes) == round(summary.questions * (1 - (summary.accuracy or 0) / 100))
    probabilities = [row["probability"] for row in mistakes]
    assert probabilities == sorted(probabilities, reverse=True)
    assert all(0 < probability <= 1 for probability in probabilities)
    for row in mistakes:
        assert answers[row["question_id"]] == row["answer"]
        assert row["answer"] not in row["references"]
        assert Path(row["image"]).exists()


def test_probability_is_that_of_the_answer_tokens(cached: Config) -> None:
    """Compare with the training loss of the same answer."""
    config = cached.model_copy(update={"quantization": cached.quantization.model_copy(update={"bits": None})})
    builder, model, tokenizer = open_split(config, "val"), load_base(config), load_tokenizer(config)
    for beams in 1, 3:
        settings = config.evaluate.model_copy(update={"num_beams": beams, "max_new_tokens": 20})
        found = answer_questions(model, builder, np.arange(6), tokenizer, settings)
        for number, answer in found.items():
            target = np.array(tokenizer.targets([answer.text])[0])
            inputs = builder.for_training([number], targets=lambda _, target=target: [(target, 1.0)])
            loss = model(**pipeline.batches.sequences.pack(inputs), num_items_in_batch=1).loss
            assert answer.log_probability == pytest.approx(-loss.item(), abs=1e-3)


def test_questions_on_an_image_share_its_tokens(cached: Config) -> None:
    builder = open_split(cached, "train")
    sequences = builder.for_generation([0, 1, 2, 3, 4, 5])
    assert [sequence.num_questions for sequence in sequences] == [3, 3]
    inputs = pack_prompts(sequences)
    unshared = sum(len(builder.text.prompt_ids[number]) - 1 + builder.query_tokens for number in range(6))
    assert len(inputs["position_ids"]) < 0.6 * unshared
    assert inputs["last_tokens"].tolist() == [int(builder.text.prompt_ids[number][-1]) for number in range(6)]
    for number, path in enumerate(inputs["paths"].tolist()):
        seen = [node for node in path if node >= 0]
        assert len(seen) == builder.query_tokens + len(builder.text.prompt_ids[number]) - 1


def test_answers_do_not_depend_on_batch_size_or_order(cached: Config) -> None:
    config = cached.model_copy(update={"quantization": cached.quantization.model_copy(update={"bits": None})})
    builder, model, tokenizer = open_split(config, "train"), load_base(config), load_tokenizer(config)

    def answers(batch_size: int, questions: Any) -> dict[int, str]:
        settings = config.evaluate.model_copy(update={"batch_size": batch_size})
        found = answer_questions(model, builder, np.asarray(questions), tokenizer, settings)
        return {number: answer.text for number, answer in found.items()}

    expected = answers(54, range(54))
    assert sorted(expected) == list(range(54))
    assert len(set(expected.values())) > 2
    assert answers(7, range(54)) == expected
    assert answers(2, range(53, -1, -1)) == expected, "an image with more questions than the batch size is split"
    assert answers(8, [50, 3, 17]) == {number: expected[number] for number in (50, 3, 17)}


def test_out_of_memory_halves_the_batch(
    cached: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    builder, model, tokenizer = open_split(cached, "val"), load_base(cached), load_tokenizer(cached)
    expected = answer_questions(model, builder, np.arange(18), tokenizer, cached.evaluate)
    generate, limit = Blip2LanguageHalf.generate, [5]

    def limited(self: Blip2LanguageHalf, paths: Any, **inputs: Any) -> Any:
        if len(paths) > limit[0]:
            raise OutOfMemoryError("CUDA out of memory")
        return generate(self, paths, **inputs)

    monkeypatch.setattr(Blip2LanguageHalf, "generate", limited)
    found = answer_questions(model, builder, np.arange(18), tokenizer, cached.evaluate)
    assert {number: answer.text for number, answer in found.items()} == {
        number: answer.text for number, answer in expected.items()
    }
    assert "out of memory with 18 questions at a time; retrying in two halves" in capsys.readouterr().err
    limit[0] = 0
    with pytest.raises(PipelineError, match=r"out of memory with one question .* fewer evaluate\.num_beams"):
        answer_questions(model, builder, np.arange(18), tokenizer, cached.evaluate)


@pytest.mark.parametrize("override", ["lora.r=3", "train.seed=1", "validation.steps=5", "train={}"])
def test_training_settings_are_rejected(run: Run, override: str) -> None:
    with pytest.raises(ConfigError, match=f"{override}.*trained already"):
        evaluate(run, (override,))


def test_unknown_data_format_fails_before_any_question_is_answered(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.commands.evaluate.answer_questions", lambda *_: pytest.fail("answered"))
    with pytest.raises(ConfigError, match=r"unknown data\.format 'vqa2'; did you mean vqav2"):
        evaluate(run, ("data.format=vqa2",))


def test_options_set_config_keys_and_overrides_take_precedence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def record(folder: RunLike, overrides: tuple[str, ...], with_adapter: bool) -> None:
        seen.append(load_config(Run.of(folder).config, overrides).evaluate)

    monkeypatch.setattr("pipeline.commands.evaluate.evaluate", record)

    def settings_of(*words: str) -> Any:
        done = CliRunner().invoke(main, ["evaluate", str(run.path), *words])
        assert done.exit_code == 0, done.stderr
        return seen[-1]

    official = settings_of("--preset", "official")
    assert (official.num_beams, official.max_new_tokens, official.min_new_tokens, official.length_penalty) == (
        5, 10, 1, -1.0)  # fmt: skip
    assert settings_of("--preset", "official", "--num-beams", "3").num_beams == 3
    assert settings_of("--num-beams", "3", "evaluate.num_beams=2").num_beams == 2
    assert (settings_of("--split", "train").split, settings_of("--metric", "lavis").metric) == ("train", "lavis")
    assert {"greedy", "official"} == set(PRESETS)


def test_invalid_metric_error_lists_the_allowed_ones(run: Run) -> None:
    done = CliRunner().invoke(main, ["evaluate", str(run.path), "--metric", "bleu"])
    assert done.exit_code == 2
    assert "evaluate.metric" in done.stderr
    assert "'lmms-eval'" in done.stderr


def test_captions_are_all_trained_and_written_in_the_caption_format(data_set: Path) -> None:
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(24)]
    captions = [{"id": number, "image_id": number // 2, "caption": f"a shape {number % 2}"} for number in range(48)]
    for split in "train", "val":
        (data_set / f"{split}.json").write_text(json.dumps({"images": images, "annotations": captions}))
    files = {s: {"annotations": f"{data_set}/{s}.json", "images": f"{data_set}/images"} for s in ("train", "val")}
    config = load_config(write_config(data_set, data={"format": "coco_captions", **files}))
    precompute(config)
    assert config.training_answers == "all"
    run = Run(data_set / "run")
    train_run(config, run)
    summary = evaluate(run, ("evaluate.max_new_tokens=6",))
    rows = json.loads(Path(summary.results).read_text())
    assert [row.keys() for row in rows] == [{"image_id", "caption"}] * 24


def test_split_without_references_is_answered_and_not_scored(data_set: Path) -> None:
    row = {"image": "3.png", "question": "what shape is it?", "question_id": "q-3"}
    (data_set / "test.jsonl").write_text(json.dumps(row))
    files = {"test": {"annotations": f"{data_set}/test.jsonl", "images": f"{data_set}/images"}}
    config = load_config(write_config(data_set, data=files))
    precompute(config)
    run = Run(data_set / "run")
    train_run(config, run)
    summary = evaluate(run, ("evaluate.split=test", "evaluate.metric=official"))
    assert (summary.questions, summary.scored, summary.accuracy) == (1, 0, None)
    assert [row["question_id"] for row in json.loads(Path(summary.results).read_text())] == ["q-3"]
    assert Path(summary.mistakes).read_text() == ""


def test_several_processes_are_rejected(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PipelineError, match="start it without torchrun"):
        evaluate(run)
