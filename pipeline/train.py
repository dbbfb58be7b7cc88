"""Stage two: LoRA on the 4-bit language model, from the cache alone."""

import json
import math
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from pipeline.assemble import load_base, load_tokenizer, open_batcher, trainable_questions, training_batches
from pipeline.batching import Batcher
from pipeline.config import Config, TrainConfig
from pipeline.device import pick_device
from pipeline.errors import PipelineError
from pipeline.language_model import add_lora, save_adapter
from pipeline.memory import peak_bytes, reset_peak
from pipeline.monitor import Watch
from pipeline.progress import progress_bar, say
from pipeline.run_folder import RunFolder, rows_until, write_rows
from pipeline.team import Team, world_size
from pipeline.trainer import Batches, StageTwoTrainer
from pipeline.validation import KeepBest, Validator


def train(config: Config, run: RunFolder, resume: bool = False) -> dict[str, Any] | None:
    """Train a LoRA adapter into the run folder `run`, and return the summary; None in a process that only helps.

    The folder must not exist, unless `resume`: then training goes on from its last checkpoint, or from the
    start if it has none yet. Under `torchrun` each process computes its share of every batch. Raises `PipelineError`
    or `CacheError` before anything is written if the config, the checkpoint and the cache do not fit together.
    """
    started = time.perf_counter()
    _refuse_sharding()
    config = config.with_absolute_paths()
    with Team() as team:
        if team.rank == 0:
            run.check_resumable(config) if resume else run.check_new()
        batcher = open_batcher(config, "train")
        trainable = trainable_questions(batcher, config)
        validator = _validator(config, batcher)
        run = RunFolder(team.share_out([run.path] * team.size) if team.rank == 0 else team.receive(Path))
        set_seed(config.train.seed)
        base = load_base(config, config.train.dropout)
        model = add_lora(base, **config.lora.model_dump())
        keep_best = KeepBest(run, config.validation, partial(save_adapter, model)) if validator else None
        watch = Watch(model, run, config.train.watch_steps, config.train.warmup_steps)
        trainer = _trainer(config, model, batcher, trainable, run, base.dtype, validator, keep_best, watch)
        checkpoint = run.last_checkpoint()
        if team.rank == 0:
            run.start(config)
        _tell_warmup(config.train, len(trainable))
        say(f"run {run.path}; if it is stopped: pipe train {run.config} --name {run.path.name} --resume")
        reset_peak(trainer.args.device)
        ready = time.perf_counter()
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds, peak = time.perf_counter() - ready, peak_bytes(trainer.args.device)
        computed = team.gather((trainer.questions, trainer.nodes))
    if team.rank > 0:
        return None
    _save(model, run, keep_best)
    questions, nodes = (sum(counts) for counts in zip(*computed, strict=True))
    return {
        "run": str(run.path),
        "steps": result.global_step,
        "train_loss": result.training_loss,
        "questions": len(trainable),
        "without_answer": len(batcher.text) - len(trainable),
        "skipped_steps": trainer.skipped_steps,
        "validation": keep_best.summary() if keep_best else {},
        "lora": watch.summary(),
        "questions_per_second": questions / (seconds - (keep_best.seconds if keep_best else 0)),
        "tokens_per_question": nodes / max(questions, 1),
        "peak_memory_bytes": peak,
        "seconds_training": seconds,
        "seconds": time.perf_counter() - started,
    }


def _validator(config: Config, batcher: Batcher) -> Validator | None:
    if config.validation.steps is None:
        return None
    other = open_batcher(config, config.validation.split, batcher.features)
    return Validator(other, load_tokenizer(config), config.validation, config.evaluate)


def _save(model: PeftModel, run: RunFolder, keep_best: KeepBest | None) -> None:
    """The best adapter, where it is known which is, else the last."""
    best = run.best(keep_best.best["step"]) if keep_best and keep_best.best else None
    if best and keep_best and best != run.best(keep_best.rows[-1]["step"]):
        save_adapter(model, run.last_adapter)
        best.rename(run.adapter)
    else:
        save_adapter(model, run.adapter)
    shutil.rmtree(run.best(0).parent, ignore_errors=True)


def _refuse_sharding() -> None:
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true") or "ACCELERATE_USE_DEEPSPEED" in os.environ:
        raise PipelineError(
            "training shards no weights: each process holds the 4-bit language model (1.6 GB at OPT-2.7b, 3.6 GB at "
            "6.7b) and shares the questions; choose multi-GPU without FSDP or DeepSpeed, or start it with torchrun"
        )


def _tell_warmup(settings: TrainConfig, questions: int) -> None:
    steps = settings.max_steps or math.ceil(settings.epochs * math.ceil(questions / settings.batch_size))
    if settings.warmup_steps >= steps:
        say(
            f"train.warmup_steps is {settings.warmup_steps} and the training has {steps}: the learning rate does not "
            f"get to {settings.learning_rate:g}; a tenth of the steps is usual, train.warmup_steps={steps // 10}"
        )


def _trainer(
    config: Config,
    model: PeftModel,
    batcher: Batcher,
    trainable: np.ndarray,
    run: RunFolder,
    base_dtype: torch.dtype,
    validator: Validator | None,
    keep_best: KeepBest | None,
    watch: Watch,
) -> StageTwoTrainer:
    order, lay_out, micro_batch = training_batches(config, batcher, trainable)
    trainer = StageTwoTrainer(
        model,
        _arguments(config.train, run.checkpoints, base_dtype),
        Batches(len(trainable), lay_out),
        order,
        micro_batch,
        config.train.on_not_finite == "skip",
        validator,
        # `_Log` marks a checkpoint as whole, after all that `watch` puts into it
        callbacks=[watch, _Log(run.metrics), *([keep_best] if keep_best else [])],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(settings: TrainConfig, checkpoints: Path, base_dtype: torch.dtype) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,  # micro-batches are the trainer's own
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=base_dtype == torch.bfloat16,
        fp16=base_dtype == torch.float16,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        seed=settings.seed,
        use_cpu=pick_device().type == "cpu",
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:  # several GPUs are for torchrun; DataParallel cannot copy 4-bit weights
        arguments._n_gpu = 1
    return arguments


class _Log(TrainerCallback):
    """Progress bar and `metrics.jsonl`."""

    def __init__(self, metrics: Path):
        self.metrics = metrics

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar = progress_bar("training", state.max_steps, "steps", done=state.global_step)
        if state.is_world_process_zero:
            write_rows(rows_until(state.global_step, self.metrics), self.metrics)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if world_size() > 1:
            torch.distributed.barrier()  # each process has written its part
        if state.is_world_process_zero:
            RunFolder(self.metrics.parent).mark_whole(state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs or not state.is_world_process_zero:
            return  # the summary at the end
        row = {"step": state.global_step, **logs}
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}  # JSON has no NaN
        with self.metrics.open("a") as file:
            file.write(json.dumps(finite) + "\n")
        self.bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.close()
