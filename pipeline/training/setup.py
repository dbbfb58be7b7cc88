"""Set up the trainer and its callbacks from the config."""

import os
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from pipeline.batches.training import training_batches
from pipeline.blip2.device import pick_device
from pipeline.blip2.language_model import save_adapter
from pipeline.common.compat import checkpointing_arguments
from pipeline.common.distributed import GROUP_TIMEOUT
from pipeline.common.errors import PipelineError
from pipeline.config import Config, TrainConfig
from pipeline.runs.run import Run
from pipeline.training.data import TrainingData
from pipeline.training.lora_monitor import LoraMonitorCallback
from pipeline.training.metrics import MetricsCallback
from pipeline.training.micro_batches import MicroBatcher
from pipeline.training.stopping import GracefulStopCallback, StopRequest
from pipeline.training.trainer import StageTwoTrainer
from pipeline.training.validation import BestAdapterCallback


class SingleDeviceArguments(TrainingArguments):
    """Arguments of a trainer that uses one GPU per rank: `DataParallel` cannot copy 4-bit weights."""

    @property
    def n_gpu(self) -> int:
        """Return the number of GPUs that this rank uses."""
        return min(super().n_gpu, 1)


@dataclass(frozen=True)
class Callbacks:
    """What happens during training beside the optimizer steps."""

    graceful_stop: GracefulStopCallback
    lora_monitor: LoraMonitorCallback
    metrics: MetricsCallback
    best_adapter: BestAdapterCallback | None

    def in_order(self) -> list[TrainerCallback]:
        """Return the callbacks; `metrics` completes a checkpoint after `lora_monitor` has written into it."""
        callbacks = [self.graceful_stop, self.lora_monitor, self.metrics]
        return [*callbacks, self.best_adapter] if self.best_adapter else callbacks


def make_callbacks(config: Config, run: Run, model: PeftModel, stop: StopRequest, with_validation: bool) -> Callbacks:
    """Return the callbacks that the config asks for."""
    settings = config.train
    save = partial(save_adapter, model)
    return Callbacks(
        graceful_stop=GracefulStopCallback(stop, settings.save_minutes),
        lora_monitor=LoraMonitorCallback(model, run, settings.lora_monitor_steps, settings.warmup_steps, stop),
        metrics=MetricsCallback(run, settings.save_total_limit),
        best_adapter=BestAdapterCallback(run, config.validation, save) if with_validation else None,
    )


def make_trainer(
    config: Config, run: Run, model: PeftModel, data: TrainingData, compute_dtype: torch.dtype, callbacks: Callbacks
) -> StageTwoTrainer:
    """Return the trainer of `model`.

    Args:
        config: the config.
        run: the run to train into.
        model: the language model with its adapter.
        data: the questions.
        compute_dtype: the dtype of the frozen model.
        callbacks: see `make_callbacks`.

    Raises:
        PipelineError: a tracker in `train.report_to` is unknown or not installed.
    """
    batches = training_batches(config, data.builder, data.trainable)
    micro_batch = config.train.micro_batch
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.path / "tensorboard")
    try:
        trainer = StageTwoTrainer(
            model,
            _training_arguments(config.train, run, compute_dtype),
            batches,
            MicroBatcher(None if micro_batch == "auto" else micro_batch),
            config.train.on_nonfinite == "skip",
            data.validator,
            callbacks.in_order(),
        )
    except (RuntimeError, ImportError, ValueError) as error:
        if not config.train.report_to:
            raise
        raise PipelineError(f"train.report_to {list(config.train.report_to)}: {str(error).splitlines()[0]}") from None
    trainer.remove_callback(PrinterCallback)
    return trainer


def _training_arguments(settings: TrainConfig, run: Run, compute_dtype: torch.dtype) -> TrainingArguments:
    is_float16 = compute_dtype == torch.float16
    return SingleDeviceArguments(
        output_dir=str(run.checkpoints),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,  # StageTwoTrainer forms the micro-batches
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=compute_dtype == torch.bfloat16,
        fp16=is_float16,
        **checkpointing_arguments(settings.gradient_checkpointing),
        **({"optim": "adamw_torch"} if is_float16 else {}),  # the fused optimizer hides skipped steps
        save_steps=settings.save_steps,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        seed=settings.seed,
        use_cpu=pick_device().type == "cpu",
        ddp_timeout=int(GROUP_TIMEOUT.total_seconds()),
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        report_to=list(settings.report_to),
        run_name=run.path.name,
        disable_tqdm=True,
    )
