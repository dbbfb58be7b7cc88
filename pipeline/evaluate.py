"""Answers from the cache, and their accuracy."""

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.assemble import load_base, load_tokenizer, open_batcher
from pipeline.batching import Batcher
from pipeline.config import EvaluateConfig, load_config
from pipeline.errors import PipelineError
from pipeline.examples import VQAExample
from pipeline.language_model import load_adapter
from pipeline.progress import progress_bar
from pipeline.run_folder import RunFolder
from pipeline.text import PromptTokenizer
from pipeline.vqa_accuracy import vqa_accuracy


def evaluate(run: RunFolder, overrides: tuple[str, ...] = (), with_adapter: bool = True) -> dict[str, Any]:
    """Answer the questions of `evaluate.split` with the run's adapter, or without, and return the summary.

    Writes the answers to `run.results(...)` in the official VQA results form:
    `[{"question_id": ..., "answer": ...}, ...]`. Raises `PipelineError` or `CacheError`.
    """
    started = time.perf_counter()
    run.check_finished()
    config = load_config(run.config, overrides)
    batcher = open_batcher(config, config.evaluate.split)
    examples = [VQAExample.from_record(batcher.text.record(i)) for i in range(len(batcher.text))]
    _check_method(examples, config.evaluate.method)
    model = load_base(config)
    if with_adapter:
        model = load_adapter(model, run.adapter)
    answering_started = time.perf_counter()
    answers = generate_answers(model, batcher, load_tokenizer(config), config.evaluate)
    answering_seconds = time.perf_counter() - answering_started
    results = run.results(config.evaluate.split, with_adapter)
    _write_results(examples, answers, results)
    return {
        "run": str(run.path),
        "split": config.evaluate.split,
        **score(examples, answers, config.evaluate.method),
        "results": str(results),
        "questions_per_second": len(answers) / answering_seconds,
        "seconds": time.perf_counter() - started,
    }


def generate_answers(
    model: PreTrainedModel, batcher: Batcher, tokenizer: PromptTokenizer, settings: EvaluateConfig
) -> list[str]:
    """The model's answer to every question of a split, in the split's order; beam search or greedy."""
    by_length = np.argsort(np.diff(batcher.text.prompt_ids.offsets), kind="stable")  # little padding
    answers = [""] * len(by_length)
    device = next(model.parameters()).device
    with progress_bar("answering", len(by_length), "questions") as bar, torch.inference_mode():
        for start in range(0, len(by_length), settings.batch_size):
            questions = by_length[start : start + settings.batch_size]
            batch = {name: tensor.to(device) for name, tensor in batcher.for_generation(questions)._asdict().items()}
            tokens = model.generate(**batch, num_beams=settings.num_beams, max_new_tokens=settings.max_new_tokens)
            for question, row in zip(questions, tokens, strict=True):
                answers[question] = tokenizer.decode(row)
            bar.update(len(questions))
    return answers


def score(examples: list[VQAExample], answers: list[str], method: str) -> dict[str, Any]:
    """Mean accuracy (0 to 100) over the questions that have answers, in all and by answer type."""
    by_type: dict[str, list[float]] = defaultdict(list)
    for example, answer in zip(examples, answers, strict=True):
        if example.answers:
            by_type[example.answer_type or "all"].append(vqa_accuracy(answer, example.answers, method))
    scores = [accuracy for group in by_type.values() for accuracy in group]
    return {
        "questions": len(examples),
        "scored": len(scores),
        "accuracy": sum(scores) / len(scores) if scores else None,
        "per_answer_type": {kind: sum(group) / len(group) for kind, group in sorted(by_type.items())},
        "method": method,
    }


def _check_method(examples: list[VQAExample], method: str) -> None:
    if method == "official" and examples and all(len(example.answers) == 1 for example in examples):
        raise PipelineError(
            "the official VQA accuracy compares several people's answers, and each question here has one: "
            "set evaluate.method=exact"
        )


def _write_results(examples: list[VQAExample], answers: list[str], path: Path) -> None:
    rows = [{"question_id": e.question_id, "answer": answer} for e, answer in zip(examples, answers, strict=True)]
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(rows, ensure_ascii=False))
    partial.replace(path)
