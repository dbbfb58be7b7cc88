"""Answers from the cache, and their accuracy."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from math import exp
from typing import Any

import numpy as np

from pipeline.answers.generation import Answer, answer_questions
from pipeline.answers.scores import check_metric, score, summarise
from pipeline.batches.split import load_tokenizer, open_split
from pipeline.blip2.base_model import load_base
from pipeline.blip2.language_model import load_adapter
from pipeline.common.distributed import world_size
from pipeline.common.errors import PipelineError
from pipeline.common.files import followed_by, require_writable, write_text
from pipeline.common.progress import log_info, progress_bar, with_bar
from pipeline.data.examples import VQAExample
from pipeline.data.text import truncated_answers
from pipeline.data.vqa import results_formatter
from pipeline.runs.card import write_card
from pipeline.runs.run import Run

MISTAKES = 100  # listed


def evaluate(run: Run, overrides: tuple[str, ...] = (), with_adapter: bool = True) -> dict[str, Any]:
    """Answer the questions of `evaluate.split` with the run's adapter, or without, and return the summary.

    Writes into the run's folder the answers in the data set's official form and in one of its own with what each is
    worth, the summary, and the mistakes that the model was surest of. Raises `PipelineError` or `CacheError`.
    """
    started = time.perf_counter()
    if world_size() > 1:
        raise PipelineError("evaluation runs in one process: start it without torchrun")
    config = run.trained_config(overrides)
    with followed_by(f"run the same command again; or copy the run, cp -r {run.path} COPY, and evaluate the copy"):
        for folder in (run.path, run.adapter):
            require_writable(folder)
    settings, official = config.evaluate, results_formatter(config.data.format)
    builder = open_split(config, settings.split, trained=False, answered=True)
    numbers = with_bar("questions", range(len(builder.text)), "questions")
    examples = [VQAExample.from_record(builder.text.record(number)) for number in numbers]
    check_metric(examples, settings.metric)
    tokenizer = load_tokenizer(config)
    multiline = sum(truncated_answers(builder.text, tokenizer).values())
    if multiline:
        log_info(
            f"{settings.split}: {multiline} references have several lines, and a prediction never has more than one"
        )
    model = load_base(config)
    if with_adapter:
        model = load_adapter(model, run.adapter)
    answering_started = time.perf_counter()
    with progress_bar("answering", len(examples), "questions") as bar:
        found = answer_questions(model, builder, np.arange(len(examples)), tokenizer, settings, bar.update)
    answering_seconds = time.perf_counter() - answering_started
    answers = [found[number] for number in range(len(examples))]
    texts = [answer.text for answer in answers]
    scores = score(examples, texts, settings.metric)
    results = run.results(settings.split, with_adapter)
    mistakes = run.mistakes(settings.split, with_adapter)
    write_text(results, json.dumps(official(examples, texts), ensure_ascii=False))
    write_text(run.predictions(settings.split, with_adapter), _answer_lines(examples, answers, scores))
    write_text(mistakes, _surest_mistakes(examples, answers, scores))
    summary = {
        "run": str(run.path),
        "split": settings.split,
        **summarise(examples, scores, builder.text.image_row.tolist()),
        "multiline_references": multiline,
        "metric": settings.metric,
        "adapter": with_adapter,
        "num_beams": settings.num_beams,
        "max_new_tokens": settings.max_new_tokens,
        "min_new_tokens": settings.min_new_tokens,
        "length_penalty": settings.length_penalty,
        "results": str(results),
        "mistakes": str(mistakes),
        "questions_per_second": len(examples) / answering_seconds,
        "seconds": time.perf_counter() - started,
    }
    write_text(run.evaluation(settings.split, with_adapter), json.dumps(summary, indent=2, ensure_ascii=False))
    write_card(run)
    return summary


def _answer_lines(examples: Sequence[VQAExample], answers: Sequence[Answer], scores: Sequence[float | None]) -> str:
    """JSON lines, in the order of the split; what `pipe report` shows."""
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


def _surest_mistakes(examples: Sequence[VQAExample], answers: Sequence[Answer], scores: Sequence[float | None]) -> str:
    """JSON lines: the wholly wrong answers, those first that the model gave the highest probability."""
    wrong = [place for place, value in enumerate(scores) if value == 0]
    wrong.sort(key=lambda place: -answers[place].log_probability)
    lines = []
    for place in wrong[:MISTAKES]:
        example, answer = examples[place], answers[place]
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
