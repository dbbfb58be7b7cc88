"""Stage two: LoRA on the 4-bit language model, from the cache alone."""

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from pipeline.batches.sequences import SequenceBuilder
from pipeline.batches.split import load_tokenizer, open_split
from pipeline.batches.training import trainable_questions, training_batches
from pipeline.blip2.base_model import check_lora, load_base
from pipeline.blip2.device import check_devices, dtype_name, pick_device
from pipeline.blip2.language_model import Blip2LanguageHalf, add_lora, save_adapter
from pipeline.blip2.memory import peak_bytes, reset_peak
from pipeline.common.compat import checkpointing_arguments, disable_activation_checkpointing
from pipeline.common.distributed import GROUP_TIMEOUT, DistributedContext
from pipeline.common.errors import PipelineError
from pipeline.common.files import WriteError, put_in_place, require_writable, writing
from pipeline.common.progress import log_info
from pipeline.config import Config, TrainConfig
from pipeline.data.text import log_truncated_answers, truncated_answers
from pipeline.runs.card import write_card
from pipeline.runs.checkpoints import remove_incomplete, sound_checkpoint
from pipeline.runs.record import begin_record, end_record
from pipeline.runs.run import Run, read_jsonl
from pipeline.training.lora_monitor import LoraMonitorCallback
from pipeline.training.metrics import MetricsCallback
from pipeline.training.stopping import GracefulStopCallback, StopRequest
from pipeline.training.trainer import StageTwoTrainer
from pipeline.training.validation import BestAdapterCallback, Validator

LoadBase = Callable[[Config], Blip2LanguageHalf]


class StoppedError(PipelineError):
    """Training was told to stop, and has saved."""


@dataclass(frozen=True)
class Data:
    """What a run trains on, and looks at meanwhile."""

    builder: SequenceBuilder
    trainable: np.ndarray
    """Numbers of the questions that have an answer."""
    validator: Validator | None
    cut: int
    """Questions with answers of which only a part can be said."""


def load_for_training(config: Config) -> Blip2LanguageHalf:
    """The base model of a training, with the dropout that it asks for."""
    return load_base(config, config.train.dropout)


def train(config: Config, run: Run, resume: bool = False, load: LoadBase = load_for_training) -> dict[str, Any] | None:
    """Train a LoRA adapter into the run folder `run`, and return the summary; None in a process that only helps.

    The folder must not exist, unless `resume`: then training goes on from its newest checkpoint without damage, or from
    the start if none was written yet. Under `torchrun` each process computes its share of every batch. `load` gives the
    model to adapt; in the end it is as it was.

    Raises:
        PipelineError, CacheError: before anything is written, if the config, the checkpoint and the cache do not fit
            together.
        WriteError: a file could not be written; what was trained until the last checkpoint is kept.
        StoppedError: on Ctrl-C or SIGTERM, when all is saved.
    """
    _refuse_sharding()
    with _explaining_writes(run), ExitStack() as holding:  # of the run's folder, until the adapter is in place
        return _train(config.with_absolute_paths(), run, resume, load, holding)


@contextmanager
def _explaining_writes(run: Run) -> Iterator[None]:
    """Have a failed write say how to resume."""
    try:
        with writing(run.path):
            yield
    except WriteError as error:
        raise error.followed_by(
            f"`{run.resume_command}`" if run.config.is_file() else "run the same command again"
        ) from error


def _train(config: Config, run: Run, resume: bool, load: LoadBase, holding: ExitStack) -> dict[str, Any] | None:
    started = time.perf_counter()
    with DistributedContext() as dist:
        check_devices(dist, config.quantization.compute_dtype)
        checkpoint: Path | None = None
        if dist.rank == 0:
            if resume:
                run.check_resumable(config)
                checkpoint = _hold_to_resume(run, config, holding)
            else:
                run.check_new()
            require_writable(run.path)
        check_lora(config)
        data = _open_data(config)
        path, checkpoint = dist.broadcast((run.path, checkpoint))
        run = Run(path)
        base = load(config)
        set_seed(config.train.seed)
        model = add_lora(base, **config.lora.model_dump())
        stop = StopRequest()
        keep_best = (
            BestAdapterCallback(run, config.validation, partial(save_adapter, model)) if data.validator else None
        )
        watch = LoraMonitorCallback(model, run, config.train.lora_monitor_steps, config.train.warmup_steps, stop)
        # `MetricsCallback` marks a checkpoint as complete, after all that `watch` puts into it.
        log = MetricsCallback(run, config.train.save_total_limit)
        callbacks = [GracefulStopCallback(stop, config.train.save_minutes), watch, log]
        callbacks += [keep_best] if keep_best else []
        if dist.rank == 0 and not resume:
            holding.enter_context(_held(run))
            run.check_new()  # another process may have begun it meanwhile
        trainer = _trainer(config, model, data, run, base.dtype, callbacks)
        if dist.rank == 0:
            run.start(config)
            begin_record(run, config, data.builder.features, trainer.args.device.type, dtype_name(base.dtype))
        _log_warmup(config.train, len(data.trainable))
        log_info(f"run {run.path}; if it is stopped: {run.resume_command}")
        reset_peak(trainer.args.device)
        ready = time.perf_counter()
        with stop, closing(log), dist.handle_lost_ranks(f"resume with {run.resume_command}"):
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds, peak = time.perf_counter() - ready, peak_bytes(trainer.args.device)
        computed = dist.gather((trainer.questions, trainer.nodes, result.training_loss))
    if stop.made and result.global_step < trainer.state.max_steps:
        done = f"step {result.global_step} of {trainer.state.max_steps}"
        raise StoppedError(f"stopped at {done}, saved; it goes on with: {run.resume_command}")
    if dist.rank > 0:
        return None
    questions, nodes = sum(one[0] for one in computed), sum(one[1] for one in computed)
    loss = fmean(one[2] for one in computed)  # of the steps since the last log the library has each process's own
    summary = {
        "run": str(run.path),
        "steps": result.global_step,
        "train_loss": _mean_loss(run) if checkpoint else loss,  # the library's forgets what was before
        "questions": len(data.trainable),
        "without_answer": len(data.builder.text) - len(data.trainable),
        "multiline_answers": data.cut,
        "skipped_steps": trainer.skipped_steps,
        "validation": keep_best.summary() if keep_best else {},
        "lora": watch.summary(),
        "questions_per_second": questions / (seconds - (keep_best.seconds if keep_best else 0)),
        "tokens_per_question": nodes / max(questions, 1),
        "peak_memory_bytes": peak,
        "seconds_training": seconds,
        "seconds": time.perf_counter() - started,
    }
    end_record(run, summary)
    _save(model, run, keep_best, result.global_step)  # at last: its folder says that the training is finished
    model.unload()
    disable_activation_checkpointing(base)
    return summary


def _mean_loss(run: Run) -> float | None:
    """Of all steps that were logged; None if there is none."""
    losses = [row["loss"] for row in read_jsonl(sys.maxsize, run.metrics) if row["loss"] is not None]
    return fmean(losses) if losses else None


def _open_data(config: Config) -> Data:
    builder = open_split(config, "train")
    tokenizer, validator = load_tokenizer(config), None
    if config.validation.steps is not None:
        other = open_split(config, config.validation.split, builder.features, answered=True)
        validator = Validator(other, tokenizer, config.validation, config.evaluate)
    cut = len(truncated_answers(builder.text, tokenizer))
    log_truncated_answers("train", cut, tokenizer)
    return Data(builder, trainable_questions(builder, config), validator, cut)


@contextmanager
def _held(run: Run) -> Iterator[None]:
    """Keep others from the run's folder; if anything fails, remove what this process has begun and not completed."""
    try:
        lock = run.hold()
    except WriteError:
        run.discard_unstarted()
        raise
    before = set(run.checkpoints.glob("*"))
    try:
        yield
    except BaseException:
        remove_incomplete(run.checkpoints, before)
        run.discard_unstarted()
        raise
    finally:
        lock.release()


def _hold_to_resume(run: Run, config: Config, holding: ExitStack) -> Path | None:
    """Hold the run's folder; the checkpoint to resume from."""
    holding.enter_context(_held(run))
    run.check_resumable(config)  # another process may have finished it meanwhile
    checkpoint = sound_checkpoint(run.checkpoints, f"pipe train {run.config} --name ANOTHER")
    if checkpoint is None:
        log_info(f"{run.path}: no checkpoint was written to its end yet; training begins with the first step")
    return checkpoint


def _save(model: PeftModel, run: Run, keep_best: BestAdapterCallback | None, step: int) -> None:
    """Put the best adapter in its place, where it is known which is, else the last; with its card."""
    last = run.best(step)
    save_adapter(model, last)
    chosen = run.best(keep_best.best["step"]) if keep_best and keep_best.best else last
    write_card(run, chosen)
    if chosen != last:
        put_in_place(last, run.last_adapter)
    put_in_place(chosen, run.adapter)
    shutil.rmtree(last.parent, ignore_errors=True)


def _refuse_sharding() -> None:
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true") or "ACCELERATE_USE_DEEPSPEED" in os.environ:
        raise PipelineError(
            "training shards no weights: each process holds the 4-bit language model (1.6 GB at OPT-2.7b, 3.6 GB at "
            "6.7b) and shares the questions; choose multi-GPU without FSDP or DeepSpeed, or start it with torchrun"
        )


def _log_warmup(settings: TrainConfig, questions: int) -> None:
    steps = settings.max_steps or math.ceil(settings.epochs * math.ceil(questions / settings.batch_size))
    if settings.warmup_steps >= steps:
        log_info(
            f"train.warmup_steps is {settings.warmup_steps} and the training has {steps}: the learning rate does not "
            f"get to {settings.learning_rate:g}; a tenth of the steps is usual, train.warmup_steps={steps // 10}"
        )


def _trainer(
    config: Config,
    model: PeftModel,
    data: Data,
    run: Run,
    base_dtype: torch.dtype,
    callbacks: list[TrainerCallback],
) -> StageTwoTrainer:
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.path / "tensorboard")
    try:
        trainer = StageTwoTrainer(
            model,
            _arguments(config.train, run.checkpoints, base_dtype),
            training_batches(config, data.builder, data.trainable),
            None if config.train.micro_batch == "auto" else config.train.micro_batch,
            config.train.on_nonfinite == "skip",
            data.validator,
            callbacks,
        )
    except (RuntimeError, ImportError, ValueError) as error:
        if not config.train.report_to:
            raise
        raise PipelineError(f"train.report_to {list(config.train.report_to)}: {str(error).splitlines()[0]}") from None
    trainer.remove_callback(PrinterCallback)
    return trainer


class SingleDeviceArguments(TrainingArguments):
    """Arguments of a Trainer that uses one GPU per rank: `DataParallel` cannot copy 4-bit weights."""

    @property
    def n_gpu(self) -> int:
        """Number of GPUs that this rank uses."""
        return min(super().n_gpu, 1)


def _arguments(settings: TrainConfig, checkpoints: Path, base_dtype: torch.dtype) -> TrainingArguments:
    return SingleDeviceArguments(
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
        **checkpointing_arguments(settings.gradient_checkpointing),
        **({"optim": "adamw_torch"} if base_dtype == torch.float16 else {}),  # the fused one hides skipped steps
        save_steps=settings.save_steps,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        seed=settings.seed,
        use_cpu=pick_device().type == "cpu",
        ddp_timeout=int(GROUP_TIMEOUT.total_seconds()),
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        report_to=list(settings.report_to),
        run_name=checkpoints.parent.name,
        disable_tqdm=True,
    )
