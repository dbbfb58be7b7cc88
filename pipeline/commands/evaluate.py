"""Answer the questions of a split from the cache, and compute the accuracy."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

import numpy as np

from pipeline.answers.generation import GeneratedAnswer, answer_questions
from pipeline.answers.scores import check_metric, score, summarize
from pipeline.batches.sequences import SequenceBuilder
from pipeline.batches.split import load_tokenizer, open_split
from pipeline.blip2.base_model import load_base
from pipeline.blip2.language_model import load_adapter
from pipeline.common.distributed import world_size
from pipeline.common.errors import PipelineError
from pipeline.common.files import followed_by, require_writable, write_text
from pipeline.common.progress import log_info, progress_bar, with_bar
from pipeline.common.result import Result
from pipeline.config import Config
from pipeline.data.examples import VQAExample
from pipeline.data.text import PromptTokenizer, truncated_answers
from pipeline.data.vqa import results_formatter
from pipeline.runs.card import write_card
from pipeline.runs.run import Run, RunLike

MAX_MISTAKES = 100


@dataclass(frozen=True)
class EvaluateResult(Result):
    """The summary of an evaluation."""

    run: str
    split: str
    questions: int
    scored: int
    """Questions that have references and that the metric does not exclude."""
    accuracy: float | None
    """Mean accuracy of the scored questions, 0 to 100."""
    accuracy_interval: list[float] | None
    """The 95 % confidence interval, [low, high]."""
    per_answer_type: dict[str, float]
    per_question_type: dict[str, float]
    multiline_references: int
    """References with several lines, which no prediction can match."""
    metric: str
    adapter: bool
    num_beams: int
    max_new_tokens: int
    min_new_tokens: int
    length_penalty: float
    results: str
    """Path of the predictions in the official format of the data set."""
    mistakes: str
    """Path of the mistakes with the highest probability."""
    questions_per_second: float
    seconds: float


def evaluate(run: RunLike, overrides: Sequence[str] = (), with_adapter: bool = True) -> EvaluateResult:
    """Answer the questions of `evaluate.split` from the cache, and score the predictions.

    Writes into the run folder: the predictions in the official format of the data set and as JSON lines with their
    accuracies, the summary, and the mistakes with the highest probability. Updates the model card.

    Args:
        run: a `Run`, the path of a run folder, or the result of `train`.
        overrides: `key=value` overrides of the run's config.
        with_adapter: False for the model before training.

    Raises:
        ConfigError: an override is invalid.
        PipelineError: the run is not finished, does not fit the cache, or its folder is not writable.
        CacheError: there is no finished cache.
    """
    started = time.perf_counter()
    if world_size() > 1:
        raise PipelineError("evaluation runs in one process: start it without torchrun")
    run = Run.of(run)
    config = run.trained_config(tuple(overrides))
    _check_writable(run)
    settings, official = config.evaluate, results_formatter(config.data.format)
    builder = open_split(config, settings.split, trained=False, answered=True)
    indices = with_bar("questions", range(len(builder.text)), "questions")
    examples = [VQAExample.from_record(builder.text.record(index)) for index in indices]
    check_metric(examples, settings.metric)
    tokenizer = load_tokenizer(config)
    multiline = _count_multiline_references(builder, tokenizer, settings.split)
    answers, answering_seconds = _answer_all(run, config, builder, tokenizer, with_adapter)
    texts = [answer.text for answer in answers]
    scores = score(examples, texts, settings.metric)
    results = run.results(settings.split, with_adapter)
    mistakes = run.mistakes(settings.split, with_adapter)
    write_text(results, json.dumps(official(examples, texts), ensure_ascii=False))
    write_text(run.predictions(settings.split, with_adapter), _prediction_lines(examples, answers, scores))
    write_text(mistakes, _mistake_lines(examples, answers, scores))
    result = EvaluateResult(
        run=str(run.path),
        split=settings.split,
        **summarize(examples, scores, builder.text.image_row.tolist()),
        multiline_references=multiline,
        metric=settings.metric,
        adapter=with_adapter,
        num_beams=settings.num_beams,
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens,
        length_penalty=settings.length_penalty,
        results=str(results),
        mistakes=str(mistakes),
        questions_per_second=len(examples) / answering_seconds,
        seconds=time.perf_counter() - started,
    )
    summary = json.dumps(result.to_dict(), indent=2, ensure_ascii=False)
    write_text(run.evaluation(settings.split, with_adapter), summary)
    write_card(run)
    return result


def _check_writable(run: Run) -> None:
    advice = f"run the same command again; or copy the run, cp -r {run.path} COPY, and evaluate the copy"
    with followed_by(advice):
        for folder in (run.path, run.adapter):
            require_writable(folder)


def _count_multiline_references(builder: SequenceBuilder, tokenizer: PromptTokenizer, split: str) -> int:
    count = sum(truncated_answers(builder.text, tokenizer).values())
    if count:
        log_info(f"{split}: {count} references have several lines, and a prediction never has more than one")
    return count


def _answer_all(
    run: Run, config: Config, builder: SequenceBuilder, tokenizer: PromptTokenizer, with_adapter: bool
) -> tuple[list[GeneratedAnswer], float]:
    """Return the answers in the order of the split, and the seconds that generation took."""
    model = load_base(config)
    if with_adapter:
        model = load_adapter(model, run.adapter)
    count = len(builder.text)
    started = time.perf_counter()
    with progress_bar("answering", count, "questions") as bar:
        answers = answer_questions(model, builder, np.arange(count), tokenizer, config.evaluate, bar.update)
    return [answers[index] for index in range(count)], time.perf_counter() - started


def _prediction_lines(
    examples: Sequence[VQAExample], answers: Sequence[GeneratedAnswer], scores: Sequence[float | None]
) -> str:
    """Format all predictions as JSON lines in the order of the split, as `pipe report` reads them."""
    lines = []
    for example, answer, accuracy in zip(examples, answers, scores, strict=True):
        record = {
            "question_id": example.question_id,
            "answer": answer.text,
            "accuracy": accuracy,
            "probability": round(exp(answer.log_probability), 4),
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


def _mistake_lines(
    examples: Sequence[VQAExample], answers: Sequence[GeneratedAnswer], scores: Sequence[float | None]
) -> str:
    """Format the predictions with an accuracy of 0 as JSON lines, by descending probability."""
    mistakes = [(example, answer) for example, answer, value in zip(examples, answers, scores, strict=True)
                if value == 0]  # fmt: skip
    mistakes.sort(key=lambda pair: -pair[1].log_probability)
    lines = []
    for example, answer in mistakes[:MAX_MISTAKES]:
        record = {
            "question_id": example.question_id,
            "image": str(example.image),
            "question": example.question,
            "answer": answer.text,
            "probability": exp(answer.log_probability),
            "references": dict(Counter(example.answers).most_common()),
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)
