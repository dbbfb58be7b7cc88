"""Compute loss and VQA accuracy on held-out questions during training, keep the best adapter, and stop early."""

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
from pipeline.blip2.memory import split_on_out_of_memory
from pipeline.common.distributed import rank, world_size
from pipeline.common.errors import PipelineError
from pipeline.common.progress import log_info, log_warning
from pipeline.config import EvaluateConfig, ValidationConfig
from pipeline.data.examples import VQAExample
from pipeline.data.text import PromptTokenizer
from pipeline.runs.jsonl import read_jsonl, write_jsonl
from pipeline.runs.run import Run, adapter_damage

SUMS = ("accuracy", "questions", "loss", "label_weight")
"""What `Validator` returns, in this order."""


class Validator:
    """Computes the loss and the greedy accuracy on this rank's validation questions."""

    def __init__(
        self,
        builder: SequenceBuilder,
        tokenizer: PromptTokenizer,
        settings: ValidationConfig,
        generation: EvaluateConfig,
    ) -> None:
        """Choose the questions.

        Args:
            builder: the split that the questions come from.
            tokenizer: decodes the predictions.
            settings: the number of questions, and the seed of the choice.
            generation: the metric, and how predictions are generated; its number of beams is not used.

        Raises:
            PipelineError: the chosen questions have no references that the metric can score.
        """
        self.builder, self.tokenizer = builder, tokenizer
        self.generation = generation.model_copy(update={"num_beams": 1})
        chosen = choose_questions(builder.text, settings.questions, settings.seed)
        examples = self._examples(chosen)
        check_metric(examples, generation.metric)
        if not any(is_scored(example, generation.metric) for example in examples):
            raise PipelineError(
                f"validation.split: none of the chosen questions of {settings.split} has an answer that "
                f"evaluate.metric={generation.metric} counts"
            )
        self.questions = np.array_split(chosen, world_size())[rank()]

    def __call__(self, model: PeftModel) -> np.ndarray:
        """Return (4,) float64: the sums named in `SUMS` over this rank's questions."""
        model.eval()
        if len(self.questions) == 0:
            return np.zeros(len(SUMS))
        predictions = answer_questions(model, self.builder, self.questions, self.tokenizer, self.generation)
        texts = [predictions[int(number)].text for number in self.questions]
        scores = score(self._examples(self.questions), texts, self.generation.metric)
        scored = [value for value in scores if value is not None]
        return np.array([sum(scored), len(scored), *self._loss(model)])

    def _examples(self, questions: np.ndarray) -> list[VQAExample]:
        return [VQAExample.from_record(self.builder.text.record(int(number))) for number in questions]

    def _loss(self, model: PeftModel) -> tuple[float, float]:
        """Return the summed loss of the most common answers, and the weight of their tokens."""
        device = next(model.parameters()).device

        def batch_loss(questions: Sequence[int]) -> tuple[float, float]:
            inputs = pack(self.builder.for_training(questions))
            with torch.no_grad():
                loss = float(model(**send_to_device(inputs, device), num_items_in_batch=1).loss)
            return loss, float(inputs["label_weights"].sum())

        loss_sum, weight_sum = 0.0, 0.0
        for start in range(0, len(self.questions), self.generation.batch_size):
            batch = self.questions[start : start + self.generation.batch_size].tolist()
            for loss, weight in split_on_out_of_memory(batch_loss, batch, "try a GPU with more memory"):
                loss_sum, weight_sum = loss_sum + loss, weight_sum + weight
        return loss_sum, weight_sum


def choose_questions(text: TextTable, count: int, seed: int) -> np.ndarray:
    """Return the sorted numbers of `count` answered questions: all questions on randomly chosen images.

    The last image may contribute only some of its questions. Fewer are returned if the split has no more.
    """
    answered = np.flatnonzero(np.diff(text.target_ids.offsets))
    images, image = np.unique(text.image_row[answered], return_inverse=True)
    position = np.random.default_rng(seed).permutation(len(images))
    return np.sort(answered[np.argsort(position[image], kind="stable")][:count])


class BestAdapterCallback(TrainerCallback):
    """Triggers validation, logs its metrics, keeps the best adapter, and stops training without improvement.

    All state is in `validation.jsonl`, so that a resumed training makes the same decisions as an uninterrupted one.
    """

    def __init__(self, run: Run, settings: ValidationConfig, save: Callable[[Path], object]) -> None:
        """Set up the callback.

        Args:
            run: the run to log into.
            settings: the interval in optimizer steps, and the patience in validations.
            save: writes the current adapter into a folder.
        """
        self.run, self.steps, self.patience, self.save = run, settings.steps, settings.patience, save
        self.rows: list[dict[str, Any]] = []
        self.steps_without_adapter: set[int] = set()
        """Steps whose saved adapter is missing or damaged."""
        self.seconds = 0.0

    @property
    def best(self) -> dict[str, Any] | None:
        """The row with the highest accuracy, and of these the one with the lowest loss; None without a row."""
        available = (row for row in self.rows if row["step"] not in self.steps_without_adapter)
        return max(available, key=lambda row: (row["accuracy"], -row["loss"]), default=None)

    @property
    def _should_stop_early(self) -> bool:
        best = self.best
        return bool(self.patience and best and len(self.rows) - self.rows.index(best) > self.patience)

    def summary(self) -> dict[str, Any]:
        """Return step, accuracy and loss of the best validation, their number, and their total time in seconds."""
        best = self.best or {}
        best_metrics = {f"best_{key}": best[key] for key in ("step", "accuracy", "loss") if key in best}
        return {**best_metrics, "num_validations": len(self.rows), "seconds": self.seconds}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """On resume, restore the rows up to the checkpoint."""
        self.rows = read_jsonl(self.run.validation, state.global_step)
        self._exclude_damaged_adapters()
        control.should_training_stop |= self._should_stop_early
        if state.is_world_process_zero:
            write_jsonl(self.run.validation, self.rows)

    def _exclude_damaged_adapters(self) -> None:
        while (best := self.best) and (problem := adapter_damage(self.run.best_adapter(best["step"]))):
            log_warning(f"{problem}; choosing the best adapter among the other steps")
            self.steps_without_adapter.add(best["step"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Have the trainer validate every `steps` steps and after the last step."""
        if self.steps and (state.global_step % self.steps == 0 or state.global_step >= state.max_steps):
            control.should_evaluate = True
            self._started = time.perf_counter()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        """Log the metrics, save the adapter if it is the best so far, and stop training without improvement."""
        row = {"step": state.global_step, **{key.removeprefix("eval_"): value for key, value in metrics.items()}}
        row["seconds"] = time.perf_counter() - self._started
        self.seconds += row["seconds"]
        self.rows.append(row)
        best = self.best or row
        if state.is_world_process_zero:
            if best is row:
                self.save(self.run.best_adapter(state.global_step))
            write_jsonl(self.run.validation, self.rows)  # after the adapter: each best row has one
        rank_of_row = "best so far" if best is row else f"best: {best['accuracy']:.2f} at step {best['step']}"
        log_info(f"step {row['step']}: accuracy {row['accuracy']:.2f}, loss {row['loss']:.3f} ({rank_of_row})")
        if self._should_stop_early:
            log_info(f"No improvement in {self.patience} validations; stopping early")
            control.should_training_stop = True
