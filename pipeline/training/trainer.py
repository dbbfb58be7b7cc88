"""A transformers `Trainer` whose optimizer step takes image sequences in micro-batches that fit into memory.

Micro-batches are formed just before they are computed. After an out-of-memory error they can be made smaller without a
change to the optimizer step.
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

from pipeline.batches.sequences import ImageSequence, pack
from pipeline.batches.training import TrainingBatches
from pipeline.blip2.memory import ActivationMemoryCounter, is_out_of_memory
from pipeline.common.compat import checkpoints_activations, enable_activation_checkpointing
from pipeline.common.errors import PipelineError
from pipeline.common.progress import log_warning
from pipeline.training.micro_batches import MicroBatcher, max_tokens_that_fit

StepSequences = list[ImageSequence]
"""The sequences of one optimizer step on this rank, or of one micro-batch of it."""
ValidationSums = Callable[[nn.Module], np.ndarray]
"""Maps the model to (4,) sums over this rank's questions, as `Validator` does."""

MAX_CONSECUTIVE_SKIPS = 20
"""Training stops after this many skipped steps in a row. A float16 scaler starts at 65536 and halves its scale at each
skipped step: after 16 of them it is 1, where any finite gradient stays finite."""


class StageTwoTrainer(Trainer):
    """Trains on image sequences, in micro-batches whose size is given or measured.

    A nonfinite loss or gradient stops the training with a `PipelineError`, or skips the step if `skip_nonfinite`. In
    float16 the gradient scaler skips steps whose gradients overflow. Both are counted, and `MAX_CONSECUTIVE_SKIPS` in a
    row stop the training.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        batches: TrainingBatches,
        micro_batcher: MicroBatcher,
        skip_nonfinite: bool,
        validator: ValidationSums | None,
        callbacks: list[TrainerCallback],
    ) -> None:
        """Set up the trainer.

        Args:
            model: the language model with its adapter.
            args: arguments of transformers' trainer.
            batches: this rank's sequences of each optimizer step.
            micro_batcher: its `max_size` is measured at the first step if it is None.
            skip_nonfinite: skip steps with a nonfinite loss or gradient.
            validator: computes the validation metrics; None without validation.
            callbacks: called in this order, before those of the trainer itself.
        """
        own_callbacks = [_SetEpochCallback(batches), _CountSkipsCallback(self)]
        super().__init__(model, args, train_dataset=batches, callbacks=[*callbacks, *own_callbacks])
        self._batches = batches
        self._micro_batcher = micro_batcher
        self._skip_nonfinite = skip_nonfinite
        self._validator = validator
        self._prefetcher = ThreadPoolExecutor(1, "batches")
        self._prefetched: tuple[Iterator[StepSequences], Future[StepSequences | None]] | None = None
        self._seconds_waited, self._last_log_time = 0.0, time.perf_counter()
        self.skipped_steps = 0
        """Steps skipped for a nonfinite loss or gradient."""
        self._consecutive_skips = 0
        self._step_is_nonfinite, self._step_loss, self._step_grad_norm = False, 0.0, 0.0
        self.num_questions = self.num_tokens = 0
        """Questions computed on this rank, and their tokens."""

    def get_train_dataloader(self) -> DataLoader[StepSequences]:
        """Return the loader, which is split among the ranks already."""
        return DataLoader(self._batches, batch_sampler=self._batches.sampler, collate_fn=lambda sequences: sequences)

    def get_batch_samples(
        self, epoch_iterator: Iterator[StepSequences], num_batches: int, device: torch.device
    ) -> tuple[list[StepSequences], Tensor]:
        """Return the next step's sequences, prefetched, and the sum of their label weights over all ranks.

        The list is empty at the end of the epoch. It is also empty if training is resumed from a checkpoint of its last
        step, where transformers' trainer would compute one more.
        """
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            return [], torch.tensor(0)
        if self._prefetched is None or self._prefetched[0] is not epoch_iterator:
            self._prefetch(epoch_iterator)
        assert self._prefetched is not None
        started = time.perf_counter()
        sequences = self._prefetched[1].result()
        self._seconds_waited += time.perf_counter() - started
        self._prefetch(epoch_iterator)
        if sequences is None:
            return [], torch.tensor(0)
        weight = torch.tensor([sum(float(sequence.tree.label_weights.sum()) for sequence in sequences)], device=device)
        return [sequences], self.accelerator.gather(weight).sum()

    def _prefetch(self, epoch_iterator: Iterator[StepSequences]) -> None:
        self._prefetched = epoch_iterator, self._prefetcher.submit(next, epoch_iterator, None)

    def training_step(self, model: nn.Module, inputs: StepSequences, num_items_in_batch: Tensor) -> Tensor:
        """Compute the loss of the step and its gradients; retry with smaller micro-batches when out of memory."""
        model.train()
        if self._micro_batcher.max_size is None:
            self._micro_batcher.max_size = self._measure_max_tokens(inputs)
        loss = None
        while loss is None:
            groups = self._micro_batcher.split(inputs)
            try:
                loss = self._accumulate(model, groups, num_items_in_batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve_micro_batches(groups)
            if loss is None:  # outside the except block: the error keeps tensors alive
                model.zero_grad()
                gc.collect()
                torch.cuda.empty_cache()
        self.num_questions += sum(sequence.num_questions for sequence in inputs)
        self.num_tokens += sum(sequence.num_tokens for sequence in inputs)
        return loss if self._check_finite(model, loss) else torch.zeros_like(loss)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the fraction of the time spent waiting for data, and the number of skipped steps."""
        now = time.perf_counter()
        if "loss" in logs:
            logs["loader_wait"] = self._seconds_waited / (now - self._last_log_time)
            if self._skip_nonfinite or self.accelerator.scaler:
                logs["skipped_steps"] = self.skipped_steps
            self._seconds_waited, self._last_log_time = 0.0, now
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Compute loss and accuracy on the validation questions, log them, and call the callbacks."""
        assert self._validator is not None
        sums = torch.from_numpy(self._validator(self.model)).to(self.args.device, torch.float32)
        accuracy, questions, loss, weight = self.accelerator.gather(sums[None]).sum(0).tolist()
        metrics = {"eval_accuracy": accuracy / questions, "eval_loss": loss / weight, "eval_questions": questions}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: transformers' estimate counts frozen weights as trained ones."""
        return 0

    def _accumulate(self, model: nn.Module, groups: list[StepSequences], label_weight: Tensor) -> Tensor:
        """Run forward and backward passes over all micro-batches, synchronizing gradients in the last."""
        loss = torch.zeros((), device=self.args.device)
        for number, group in enumerate(groups, start=1):
            with nullcontext() if number == len(groups) else self.accelerator.no_sync(model):
                group_loss = self.compute_loss(
                    model, send_to_device(pack(group), self.args.device), num_items_in_batch=label_weight
                )
                self.accelerator.backward(group_loss)
            loss += group_loss.detach()
        return loss

    def _measure_max_tokens(self, sequences: StepSequences) -> int:
        """Measure how many tokens fit; if not even one sequence does, enable gradient checkpointing."""
        longest = max(sequence.num_tokens for sequence in sequences)
        max_tokens = self._max_tokens_by_forward(sequences)
        if max_tokens < longest and not checkpoints_activations(self.args):
            enable_activation_checkpointing(self.model)
            log_warning("The questions on one image do not fit into memory together; enabling gradient checkpointing")
            max_tokens = self._max_tokens_by_forward(sequences)
        return max_tokens

    def _max_tokens_by_forward(self, sequences: StepSequences) -> int:
        """Return the tokens that fit by the activations of the shortest sequence; 1 if that is out of memory."""
        shortest = min(sequences, key=lambda sequence: sequence.num_tokens)
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), ActivationMemoryCounter(self.model.parameters()) as saved:
            try:
                self.compute_loss(self.model, send_to_device(pack([shortest]), self.args.device))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                return 1
        return max_tokens_that_fit(saved.bytes / shortest.num_tokens, self.args.device)

    def _halve_micro_batches(self, groups: list[StepSequences]) -> None:
        """Halve the size of this and later micro-batches.

        Raises:
            PipelineError: they cannot be made smaller.
        """
        largest, unit = self._micro_batcher.largest(groups), self._micro_batcher.unit
        problem = f"Out of memory at step {self.state.global_step + 1} with a micro-batch of {largest} {unit}"
        if all(len(group) == 1 for group in groups) or self.accelerator.num_processes > 1:
            raise PipelineError(f"{problem}. Try train.gradient_checkpointing=true, or a smaller train.micro_batch")
        self._micro_batcher.max_size = max(1, largest // 2)
        log_warning(
            f"{problem}. Retrying; later steps use micro-batches of {self._micro_batcher.max_size} {unit}. "
            "The effective batch size does not change"
        )

    def count_step(self) -> None:
        """Count the step if it was skipped; called after the optimizer step.

        Raises:
            PipelineError: too many steps in a row were skipped.
        """
        if not (self._step_is_nonfinite or self.accelerator.optimizer_step_was_skipped):
            self._consecutive_skips = 0
            return
        self.skipped_steps += 1
        self._consecutive_skips += 1
        log_warning(f"Skipping step {self.state.global_step + 1}, not finite: {self._describe_step()}")
        if self._consecutive_skips >= MAX_CONSECUTIVE_SKIPS:
            raise self._divergence_error(
                f"{self._consecutive_skips} steps in a row were skipped; the last: {self._describe_step()}"
            )

    def _check_finite(self, model: nn.Module, loss: Tensor) -> bool:
        """Return whether the step is finite; if not, drop its gradients or raise `PipelineError`."""
        losses = self.accelerator.gather(loss.reshape(1)).tolist()  # all ranks must come to the same decision
        self._step_loss = sum(losses) / len(losses)
        if self.accelerator.scaler is None:  # in float16 the scaler checks the gradients
            gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
            self._step_grad_norm = float(nn.utils.get_total_norm(gradients))
        self._step_is_nonfinite = not (math.isfinite(self._step_loss) and math.isfinite(self._step_grad_norm))
        if self._step_is_nonfinite and not self._skip_nonfinite:
            raise self._divergence_error(self._describe_step(), ", or skip such steps with train.on_nonfinite=skip")
        if self._step_is_nonfinite and self.accelerator.scaler is None:
            model.zero_grad()
        return not self._step_is_nonfinite

    def _describe_step(self) -> str:
        """Return loss, gradient norm and learning rate of the current step for messages."""
        scaler, rate = self.accelerator.scaler, self.lr_scheduler.get_last_lr()[0]
        norm = f"too large in float16, scale now {scaler.get_scale():g}" if scaler else self._step_grad_norm
        return f"loss {self._step_loss}, gradient norm {norm}, learning rate {rate:g}"

    def _divergence_error(self, found: str, alternative: str = "") -> PipelineError:
        if not self.is_world_process_zero():  # all ranks raise: wait until rank 0 has printed the error
            torch.distributed.barrier()
        return PipelineError(
            f"training diverged at step {self.state.global_step + 1}: {found}. Try a lower train.learning_rate, more "
            f"train.warmup_steps, or quantization.compute_dtype=float32{alternative}"
        )


class _SetEpochCallback(TrainerCallback):
    """Sets the epoch of the batches, also in a resumed training."""

    def __init__(self, batches: TrainingBatches) -> None:
        self._batches = batches

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._batches.set_epoch(int(state.epoch or 0))


class _CountSkipsCallback(TrainerCallback):
    """Counts skipped steps after the optimizer step, where a float16 scaler skips them."""

    def __init__(self, trainer: StageTwoTrainer) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._trainer.count_step()
