"""The loop of stage two is transformers' `Trainer`; what an optimizer step is made of is said here.

A batch is the questions of one optimizer step. Its sequences are put into micro-batches just before they are computed,
so that micro-batches can be made smaller, where memory is out, without a change to the step.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.batches.sequences import ImageSequence, SequenceBatch, micro_batches, pack
from pipeline.batches.training import TrainingBatches
from pipeline.blip2.memory import ActivationMemoryCounter, free_memory_bytes, is_out_of_memory
from pipeline.common.compat import checkpoints_activations, enable_activation_checkpointing
from pipeline.common.distributed import local_world_size
from pipeline.common.errors import PipelineError
from pipeline.common.progress import log_info

Validator = Callable[[nn.Module], np.ndarray]
"""The model -> sums over this process's questions: their accuracy, number, loss, and weight in the loss."""

SHARE_OF_FREE = 0.6
"""Of the memory that is free at the start, what activations may take."""
MOST_BYTES = {"cpu": 2 << 30, "cuda": 64 << 30}
"""For activations: beyond this, larger micro-batches gain little."""
MAX_CONSECUTIVE_SKIPS = 20
"""Skipped steps in a row that end a training. A float16 scaler begins at 65536 and skips while it halves, 16 to get
to 1, where gradients that are finite at all have been so."""


def max_tokens_that_fit(bytes_a_node: float, device: torch.device) -> int:
    """Tokens in a micro-batch, if each keeps so many bytes for the backward pass.

    Processes on one machine share what is free on its CPU.

    Rounded down to three binary digits: a little more or less of free memory does not change the order in which losses
    are summed.
    """
    free = free_memory_bytes(device) / (local_world_size() if device.type == "cpu" else 1)
    fit = int(min(SHARE_OF_FREE * free, MOST_BYTES[device.type]) / bytes_a_node)
    dropped = max(fit.bit_length() - 3, 0)
    return max(fit >> dropped << dropped, 1)


class StageTwoTrainer(Trainer):
    """Takes `batches`, and computes them in micro-batches of `micro_batch` questions.

    With `micro_batch` None these are of as many tokens as fit into memory, by measure. A loss or gradient that is not
    finite stops the training with a `PipelineError`, or with `skip_not_finite` leaves out the step and is counted. In
    float16 gradients overflow now and then: the scaler skips such steps, which are counted too. Too many in a row stop
    the training in any case.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        batches: TrainingBatches,
        micro_batch: int | None,
        skip_not_finite: bool,
        validator: Validator | None,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(
            model, args, train_dataset=batches, callbacks=[*callbacks, _TellEpoch(batches), _CountSkipped(self)]
        )
        self._batches = batches
        self._by_questions, self._most = micro_batch is not None, micro_batch or 0
        self._skip_not_finite = skip_not_finite
        self._validator = validator
        self._reader = ThreadPoolExecutor(1, "batches")
        self._reading: tuple[Iterator[SequenceBatch], Future[SequenceBatch | None]] | None = None
        self._waited, self._logged_at = 0.0, time.perf_counter()
        self.skipped_steps = 0
        """Whose loss or gradient was not finite."""
        self._skipped_in_a_row = 0
        self._left_out, self._loss, self._norm = False, 0.0, 0.0
        """Of the step at hand: whether it was not finite, its loss, and the norm of its gradients."""
        self.questions = self.nodes = 0
        """Computed in this process: questions, and the tokens that they took."""

    def get_train_dataloader(self) -> DataLoader[SequenceBatch]:
        """Batches, already shared out among the processes."""
        return DataLoader(self.train_dataset, batch_sampler=self._batches.sampler, collate_fn=lambda batch: batch)

    def get_batch_samples(
        self, epoch_iterator: Iterator[SequenceBatch], num_batches: int, device: torch.device
    ) -> tuple[list[SequenceBatch], Tensor]:
        """The next batch, put together while the last was computed, and its labels' weight in all processes.

        None where training had ended already when its last checkpoint was written: the library would go on by a step.
        """
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            return [], torch.tensor(0)
        if self._reading is None or self._reading[0] is not epoch_iterator:
            self._reading = epoch_iterator, self._reader.submit(next, epoch_iterator, None)
        started = time.perf_counter()
        batch = self._reading[1].result()
        self._waited += time.perf_counter() - started
        self._reading = epoch_iterator, self._reader.submit(next, epoch_iterator, None)
        if batch is None:
            return [], torch.tensor(0)
        weight = torch.tensor([sum(float(sequence.tree.label_weights.sum()) for sequence in batch)], device=device)
        return [batch], self.accelerator.gather(weight).sum()

    def training_step(self, model: nn.Module, inputs: SequenceBatch, num_items_in_batch: Tensor) -> Tensor:
        """The loss of the whole batch, and its gradients; where memory is out, once more in smaller micro-batches."""
        model.train()
        if not self._most:
            self._most = self._nodes_that_fit(inputs)
        loss = None
        while loss is None:
            groups = micro_batches(inputs, self._size, self._most)
            try:
                loss = self._accumulate(model, groups, num_items_in_batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(groups)
            if loss is None:  # and the error, which holds on to memory, is gone
                model.zero_grad()
                gc.collect()
                torch.cuda.empty_cache()
        self.questions += sum(sequence.num_questions for sequence in inputs)
        self.nodes += sum(sequence.num_tokens for sequence in inputs)
        return loss if self._is_finite(model, loss) else torch.zeros_like(loss)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the share of the time since the last log that was spent waiting for batches."""
        now = time.perf_counter()
        if "loss" in logs:
            logs["loader_wait"] = self._waited / (now - self._logged_at)
            if self._skip_not_finite or self.accelerator.scaler:
                logs["skipped_steps"] = self.skipped_steps
            self._waited, self._logged_at = 0.0, now
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss and accuracy on the validator's questions; callbacks are told, and so is the log."""
        assert self._validator is not None
        sums = torch.from_numpy(self._validator(self.model)).to(self.args.device, torch.float32)
        accuracy, questions, loss, weight = self.accelerator.gather(sums[None]).sum(0).tolist()
        metrics = {"eval_accuracy": accuracy / questions, "eval_loss": loss / weight, "eval_questions": questions}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the library takes every weight for one that is trained."""
        return 0

    def _accumulate(self, model: nn.Module, groups: list[SequenceBatch], labels: Tensor) -> Tensor:
        loss = torch.zeros((), device=self.args.device)
        for number, group in enumerate(groups, start=1):
            with nullcontext() if number == len(groups) else self.accelerator.no_sync(model):
                part = self.compute_loss(
                    model, send_to_device(pack(group), self.args.device), num_items_in_batch=labels
                )
                self.accelerator.backward(part)
            loss += part.detach()
        return loss

    def _size(self, sequence: ImageSequence) -> int:
        return sequence.num_questions if self._by_questions else sequence.num_tokens

    def _nodes_that_fit(self, batch: SequenceBatch) -> int:
        largest = max(sequence.num_tokens for sequence in batch)
        fit = self._fit(batch)
        if fit < largest and not checkpoints_activations(self.args):
            enable_activation_checkpointing(self.model)
            log_info("the questions on one image do not fit into memory at once: gradient checkpointing is switched on")
            fit = self._fit(batch)
        return fit

    def _fit(self, batch: SequenceBatch) -> int:
        """By what the forward pass of the shortest sequence keeps in memory; 1 where not even that fits."""
        shortest = min(batch, key=lambda sequence: sequence.num_tokens)
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), ActivationMemoryCounter(self.model.parameters()) as saved:
            try:
                self.compute_loss(self.model, send_to_device(pack([shortest]), self.args.device))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                return 1
        return max_tokens_that_fit(saved.bytes / shortest.num_tokens, self.args.device)

    def _halve(self, groups: list[SequenceBatch]) -> None:
        """Half as much at a time from now on. Raises `PipelineError` if micro-batches cannot be made smaller."""
        largest = max(sum(map(self._size, group)) for group in groups)
        unit = "questions" if self._by_questions else "tokens"
        if all(len(group) == 1 for group in groups) or self.accelerator.num_processes > 1:
            raise PipelineError(
                f"out of memory at step {self.state.global_step + 1} with {largest} {unit} at a time; try "
                "train.gradient_checkpointing=true, or a smaller train.micro_batch"
            )
        self._most = max(1, largest // 2)
        log_info(
            f"out of memory at step {self.state.global_step + 1} with {largest} {unit} at a time: the step is computed "
            f"again, and all that follow, with {self._most}; the effective batch stays as it is"
        )

    def count_step(self) -> None:
        """Called when the optimizer has had the step. Raises `PipelineError` if too many in a row were skipped."""
        if not (self._left_out or self.accelerator.optimizer_step_was_skipped):
            self._skipped_in_a_row = 0
            return
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        log_info(f"step {self.state.global_step + 1} is skipped, not finite: {self._found()}")
        if self._skipped_in_a_row >= MAX_CONSECUTIVE_SKIPS:
            raise self._diverged(f"{self._skipped_in_a_row} steps in a row were skipped; the last: {self._found()}")

    def _is_finite(self, model: nn.Module, loss: Tensor) -> bool:
        """Whether the step may be taken; if not, its gradients are dropped."""
        losses = self.accelerator.gather(loss.reshape(1)).tolist()  # the processes must decide alike
        self._loss = sum(losses) / len(losses)
        if self.accelerator.scaler is None:  # float16: the scaler's business
            gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
            self._norm = float(nn.utils.get_total_norm(gradients))
        self._left_out = not (math.isfinite(self._loss) and math.isfinite(self._norm))
        if self._left_out and not self._skip_not_finite:
            raise self._diverged(self._found(), ", or skip such steps with train.on_nonfinite=skip")
        if self._left_out and self.accelerator.scaler is None:
            model.zero_grad()
        return not self._left_out

    def _found(self) -> str:
        """What the step at hand was like."""
        scaler, rate = self.accelerator.scaler, self.lr_scheduler.get_last_lr()[0]
        norm = f"too large in float16, scale now {scaler.get_scale():g}" if scaler else self._norm
        return f"loss {self._loss}, gradient norm {norm}, learning rate {rate:g}"

    def _diverged(self, found: str, instead: str = "") -> PipelineError:
        if not self.is_world_process_zero():  # all find the same; process 0 alone says it, and is waited for
            torch.distributed.barrier()
        return PipelineError(
            f"training diverged at step {self.state.global_step + 1}: {found}. Try a lower train.learning_rate, more "
            f"train.warmup_steps, or quantization.compute_dtype=float32{instead}"
        )


class _TellEpoch(TrainerCallback):
    """Sets the epoch of the batches, also in a resumed training."""

    def __init__(self, batches: TrainingBatches) -> None:
        self._batches = batches

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._batches.set_epoch(int(state.epoch or 0))


class _CountSkipped(TrainerCallback):
    """Has each step counted once the optimizer had it: a float16 scaler skips it only there."""

    def __init__(self, trainer: StageTwoTrainer) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._trainer.count_step()
