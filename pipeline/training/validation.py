"""Loss and VQA accuracy on questions of another split while training goes on, and the best adapter kept by them."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cache.text import TextTable
from pipeline.answers.generation import answer_questions
from pipeline.answers.scores import check_metric, is_scored, score
from pipeline.batches.sequences import SequenceBuilder, pack
from pipeline.blip2.memory import in_parts
from pipeline.common.distributed import rank, world_size
from pipeline.common.errors import PipelineError
from pipeline.common.progress import log_info
from pipeline.config import EvaluateConfig, ValidationConfig
from pipeline.data.examples import VQAExample
from pipeline.data.text import PromptTokenizer
from pipeline.runs.run import Run, adapter_damage, read_jsonl, write_rows

SUMS = ("accuracy", "questions", "loss", "label_weight")


class Validator:
    """Answers a process's share of the questions."""

    def __init__(
        self,
        builder: SequenceBuilder,
        tokenizer: PromptTokenizer,
        settings: ValidationConfig,
        answering: EvaluateConfig,
    ) -> None:
        """Raises `PipelineError` if the split has no answers that `answering.metric` can score."""
        self.builder, self.tokenizer = builder, tokenizer
        self.answering = answering.model_copy(update={"num_beams": 1})
        chosen = choose_questions(builder.text, settings.questions, settings.seed)
        examples = self._examples(chosen)
        check_metric(examples, answering.metric)
        if not any(is_scored(example, answering.metric) for example in examples):
            raise PipelineError(
                f"validation.split: of the questions of {settings.split} that were chosen, none has an answer that "
                f"evaluate.metric={answering.metric} counts"
            )
        self.questions = np.array_split(chosen, world_size())[rank()]

    def __call__(self, model: PeftModel) -> np.ndarray:
        """(4,) float64: over this process's questions, sums by the names in `SUMS`."""
        model.eval()
        if len(self.questions) == 0:
            return np.zeros(len(SUMS))
        answers = answer_questions(model, self.builder, self.questions, self.tokenizer, self.answering)
        examples = self._examples(self.questions)
        scores = score(examples, [answers[int(number)].text for number in self.questions], self.answering.metric)
        known = [value for value in scores if value is not None]
        return np.array([sum(known), len(known), *self._loss(model)])

    def _examples(self, questions: np.ndarray) -> list[VQAExample]:
        return [VQAExample.from_record(self.builder.text.record(int(number))) for number in questions]

    def _loss(self, model: PeftModel) -> tuple[float, float]:
        """The summed loss of the most common answers, and the number of their tokens."""
        device = next(model.parameters()).device

        def loss_of(questions: Sequence[int]) -> tuple[float, float]:
            inputs = pack(self.builder.for_training(questions))
            with torch.no_grad():
                loss = float(model(**send_to_device(inputs, device), num_items_in_batch=1).loss)
            return loss, float(inputs["label_weights"].sum())

        summed, weight = 0.0, 0.0
        for start in range(0, len(self.questions), self.answering.batch_size):
            batch = self.questions[start : start + self.answering.batch_size].tolist()
            for loss, labels in in_parts(loss_of, batch, "try a GPU with more memory"):
                summed, weight = summed + loss, weight + labels
        return summed, weight


def choose_questions(text: TextTable, count: int, seed: int) -> np.ndarray:
    """Numbers of about `count` questions that have answers, in rising order: all those on images chosen at random."""
    answered = np.flatnonzero(np.diff(text.target_ids.offsets))
    images, image = np.unique(text.image_row[answered], return_inverse=True)
    place = np.random.default_rng(seed).permutation(len(images))
    return np.sort(answered[np.argsort(place[image], kind="stable")][:count])


class BestAdapterCallback(TrainerCallback):
    """Decides when to look, writes down what was seen, keeps the best adapter, and ends what gets no better.

    All is read off `validation.jsonl`: a training that is gone on with decides as one that was never stopped.
    """

    def __init__(self, run: Run, settings: ValidationConfig, save: Callable[[Path], object]) -> None:
        self.run, self.steps, self.patience, self.save = run, settings.steps, settings.patience, save
        self.rows: list[dict[str, Any]] = []
        self.lost: set[int] = set()
        """Steps whose adapter is not there any more."""
        self.seconds = 0.0

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the highest accuracy, of equal ones that of the lowest loss."""
        kept = (row for row in self.rows if row["step"] not in self.lost)
        return max(kept, key=lambda row: (row["accuracy"], -row["loss"]), default=None)

    @property
    def _gets_no_better(self) -> bool:
        best = self.best
        return bool(self.patience and best and len(self.rows) - self.rows.index(best) > self.patience)

    def summary(self) -> dict[str, Any]:
        """The best look, and the time that all took."""
        best = self.best or {}
        found = {f"best_{key}": best[key] for key in ("step", "accuracy", "loss") if key in best}
        return {**found, "num_validations": len(self.rows), "seconds": self.seconds}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.rows = read_jsonl(state.global_step, self.run.validation)
        self._forget_lost()
        control.should_training_stop |= self._gets_no_better
        if state.is_world_process_zero:
            write_rows(self.rows, self.run.validation)

    def _forget_lost(self) -> None:
        """Let no adapter that is gone or damaged be the best."""
        while (best := self.best) and (problem := adapter_damage(self.run.best(best["step"]))):
            log_info(f"{problem}; the best adapter is taken from the other steps")
            self.lost.add(best["step"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.steps and (state.global_step % self.steps == 0 or state.global_step >= state.max_steps):
            control.should_evaluate = True
            self._began = time.perf_counter()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        row = {"step": state.global_step, **{key.removeprefix("eval_"): value for key, value in metrics.items()}}
        row["seconds"] = time.perf_counter() - self._began
        self.seconds += row["seconds"]
        self.rows.append(row)
        best = self.best or row
        if state.is_world_process_zero:
            if best is row:
                self.save(self.run.best(state.global_step))
            write_rows(self.rows, self.run.validation)  # after its adapter: a row stands for one that is there
        told = "the best so far" if best is row else f"the best is {best['accuracy']:.2f} of step {best['step']}"
        log_info(f"step {row['step']}: accuracy {row['accuracy']:.2f}, loss {row['loss']:.3f}; {told}")
        if self._gets_no_better:
            log_info(f"no better in {self.patience} looks: training ends")
            control.should_training_stop = True
