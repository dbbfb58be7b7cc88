"""Stage two: train a LoRA adapter on the 4-bit language model from cached query features."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from peft import PeftModel
from transformers import set_seed
from transformers.trainer_utils import TrainOutput

from pipeline.blip2.base_model import check_lora, load_base
from pipeline.blip2.device import check_devices, dtype_name
from pipeline.blip2.language_model import Blip2LanguageHalf, add_lora, save_adapter
from pipeline.blip2.memory import peak_bytes, reset_peak
from pipeline.common.compat import disable_activation_checkpointing
from pipeline.common.distributed import DistributedContext
from pipeline.common.errors import ConfigError, PipelineError
from pipeline.common.files import WriteError, put_in_place, require_writable, writing
from pipeline.common.progress import log_info, log_warning
from pipeline.common.result import Result
from pipeline.config import Config, TrainConfig, load_config
from pipeline.runs.card import write_card
from pipeline.runs.checkpoints import newest_valid_checkpoint
from pipeline.runs.jsonl import read_jsonl
from pipeline.runs.record import write_inputs, write_summary
from pipeline.runs.run import Run, named_run, next_run
from pipeline.training.data import TrainingData, open_training_data
from pipeline.training.estimate import num_training_steps
from pipeline.training.setup import Callbacks, make_callbacks, make_trainer
from pipeline.training.stopping import StopRequest
from pipeline.training.trainer import StageTwoTrainer
from pipeline.training.validation import BestAdapterCallback

LoadBase = Callable[[Config], Blip2LanguageHalf]


class StoppedError(PipelineError):
    """Training was interrupted and has saved a checkpoint."""


@dataclass(frozen=True)
class TrainResult(Result):
    """The summary of a training."""

    run: str
    """The run folder."""
    steps: int
    train_loss: float | None
    """Mean over all steps; of a resumed training over the logged ones, None if none was logged."""
    questions: int
    """Trainable questions of the split."""
    without_answer: int
    multiline_answers: int
    """Questions whose answer has several lines, of which only the first is trained."""
    skipped_steps: int
    validation: dict[str, Any]
    """See `BestAdapterCallback.summary`; empty without validation."""
    lora: dict[str, Any]
    """See `LoraMonitorCallback.summary`; empty without monitoring."""
    questions_per_second: float
    tokens_per_question: float
    peak_memory_bytes: int
    """Of rank 0: torch's allocations on a GPU, else resident memory."""
    seconds_training: float
    seconds: float


@dataclass(frozen=True)
class Totals:
    """What all ranks computed together."""

    questions: int
    tokens: int
    train_loss: float | None


def train(config: Config, name: str | None = None, resume: bool = False) -> TrainResult | None:
    """Train a LoRA adapter from the cache into the run folder `config.train.output_dir / name`.

    Args:
        config: the config; see `load_config`.
        name: the name of the run; by default that of the cache's folder and the next free number.
        resume: resume the run `name` from its newest valid checkpoint.

    Returns:
        The summary on rank 0, None elsewhere.

    Raises:
        ConfigError: `name` is not a plain folder name, or missing with `resume`.
        PipelineError, CacheError, WriteError, StoppedError: see `train_run`.
    """
    if resume and name is None:
        raise ConfigError("resume=True needs the name of the run")
    output_dir = config.train.output_dir
    run = named_run(output_dir, name) if name else next_run(output_dir, config.cache.dir.name)
    return train_run(config, run, resume)


def resolve_run(
    source: Path, overrides: Sequence[str] = (), name: str | None = None, resume: bool = False
) -> tuple[Config, Run]:
    """Return the config and the run that the arguments of `pipe train` stand for.

    `source` is a config, or with `resume` and no `name` a run folder. The run of a config is `train.output_dir`/`name`,
    by default named after the config with the next free number.

    Raises:
        ConfigError: the config is invalid, or `resume` is set without a run.
    """
    if resume and not name:
        if not source.is_dir():
            raise ConfigError(f"{source}: --resume needs a run: give its folder in place of CONFIG, or its --name")
        return load_config(Run(source).config, overrides), Run(source)
    config = load_config(source, overrides)
    output_dir = config.train.output_dir
    return config, named_run(output_dir, name) if name else next_run(output_dir, source.stem)


def load_for_training(config: Config) -> Blip2LanguageHalf:
    """Return the base model with the config's dropout."""
    return load_base(config, config.train.dropout)


def train_run(config: Config, run: Run, resume: bool = False, load: LoadBase = load_for_training) -> TrainResult | None:
    """Train a LoRA adapter into the folder of `run`.

    Under `torchrun` each rank computes a part of every optimizer step.

    Args:
        config: the config.
        run: the run; its folder must not exist unless `resume`.
        resume: continue from the newest valid checkpoint, or from the first step if there is none.
        load: returns the base model; it is unchanged after a successful training.

    Returns:
        The summary on rank 0, None elsewhere.

    Raises:
        PipelineError, CacheError: the config, the checkpoint and the cache do not match, or the run cannot start;
            nothing is written then. Or training diverged or ran out of memory.
        WriteError: a file could not be written; the run can be resumed from its last checkpoint.
        StoppedError: interrupted by Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    started = time.perf_counter()
    _refuse_sharding()
    config = config.with_absolute_paths()
    with _explain_write_errors(run), DistributedContext() as context:
        check_devices(context, config.quantization.compute_dtype)
        with _prepared_run(context, config, run, resume) as (run, checkpoint):
            check_lora(config)
            data = open_training_data(config)

            base = load(config)
            set_seed(config.train.seed)
            model = add_lora(base, **config.lora.model_dump())

            stop = StopRequest()
            callbacks = make_callbacks(config, run, model, stop, with_validation=data.validator is not None)
            trainer = make_trainer(config, run, model, data, base.dtype, callbacks)
            if context.rank == 0:
                run.write_config(config)
                device = trainer.args.device.type
                write_inputs(run, config, data.builder.features, device, dtype_name(base.dtype))
            _warn_of_long_warmup(config.train, len(data.trainable))
            log_info(f"Training {run.path}. If interrupted, resume: `{run.resume_command}`")

            reset_peak(trainer.args.device)
            training_started = time.perf_counter()
            with stop, closing(callbacks.metrics), context.handle_lost_ranks(f"resume: `{run.resume_command}`"):
                output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            seconds_training = time.perf_counter() - training_started

            totals = _gather_totals(context, trainer, output)
            if stop.requested and output.global_step < trainer.state.max_steps:
                raise StoppedError(
                    f"Interrupted at step {output.global_step} of {trainer.state.max_steps}. Completed work is saved. "
                    f"Resume: `{run.resume_command}`"
                )
            if context.rank > 0:
                return None

            if checkpoint:  # transformers' mean does not cover the steps before it
                totals = replace(totals, train_loss=_mean_logged_loss(run))
            result = _summarize(run, data, callbacks, totals, trainer, seconds_training, started)
            write_summary(run, result.to_dict())
            _save_adapter(model, run, callbacks.best_adapter, output.global_step)
            model.unload()
            disable_activation_checkpointing(base)
            return result


def _refuse_sharding() -> None:
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true") or "ACCELERATE_USE_DEEPSPEED" in os.environ:
        raise PipelineError(
            "FSDP and DeepSpeed are not supported: each rank holds the 4-bit language model (1.6 GB for OPT-2.7b, "
            "3.6 GB for 6.7b), and the questions are split among the ranks. Use plain multi-GPU, or torchrun"
        )


@contextmanager
def _explain_write_errors(run: Run) -> Iterator[None]:
    """Add the command that resumes to the errors of failed writes."""
    try:
        with writing(run.path):
            yield
    except WriteError as error:
        next_step = f"`{run.resume_command}`" if run.config.is_file() else "run the same command again"
        raise error.followed_by(next_step) from error


@contextmanager
def _prepared_run(
    context: DistributedContext, config: Config, run: Run, resume: bool
) -> Iterator[tuple[Run, Path | None]]:
    """Check and lock the run folder on rank 0; yield the run and the checkpoint to resume from on all ranks.

    Ranks that start later may have chosen another free run name, so all take that of rank 0.
    """
    if context.rank > 0:
        yield context.scatter()
        return
    _check_can_start(config, run, resume)
    require_writable(run.path)
    with run.locked():
        _check_can_start(config, run, resume)  # another process may have used the run before it was locked
        checkpoint = _find_checkpoint(run) if resume else None
        yield context.scatter([(run, checkpoint)] * context.world_size)


def _check_can_start(config: Config, run: Run, resume: bool) -> None:
    if resume:
        run.check_resumable(config)
    else:
        run.check_new()


def _find_checkpoint(run: Run) -> Path | None:
    checkpoint = newest_valid_checkpoint(run.checkpoints, f"pipe train {run.config} --name ANOTHER")
    if checkpoint is None:
        log_warning(f"{run.path}: no complete checkpoint; training starts at the first step")
    return checkpoint


def _warn_of_long_warmup(settings: TrainConfig, num_questions: int) -> None:
    steps = num_training_steps(settings, num_questions)
    if settings.warmup_steps >= steps:
        log_warning(
            f"train.warmup_steps is {settings.warmup_steps}, but training has {steps} steps: the learning rate never "
            f"reaches {settings.learning_rate:g}. A tenth of the steps is usual: train.warmup_steps={steps // 10}"
        )


def _gather_totals(context: DistributedContext, trainer: StageTwoTrainer, output: TrainOutput) -> Totals:
    """Combine what each rank computed; the result is complete on rank 0 only."""
    own = trainer.num_questions, trainer.num_tokens, float(output.training_loss)
    questions, tokens, losses = zip(*(context.gather(own) or [own]), strict=True)
    return Totals(sum(questions), sum(tokens), fmean(losses))  # transformers averages over ranks only when it logs


def _mean_logged_loss(run: Run) -> float | None:
    losses = [row["loss"] for row in read_jsonl(run.metrics) if row["loss"] is not None]
    return fmean(losses) if losses else None


def _summarize(
    run: Run,
    data: TrainingData,
    callbacks: Callbacks,
    totals: Totals,
    trainer: StageTwoTrainer,
    seconds_training: float,
    started: float,
) -> TrainResult:
    validation = callbacks.best_adapter.summary() if callbacks.best_adapter else {}
    return TrainResult(
        run=str(run.path),
        steps=trainer.state.global_step,
        train_loss=totals.train_loss,
        questions=len(data.trainable),
        without_answer=len(data.builder.text) - len(data.trainable),
        multiline_answers=data.multiline_answers,
        skipped_steps=trainer.skipped_steps,
        validation=validation,
        lora=callbacks.lora_monitor.summary(),
        questions_per_second=totals.questions / (seconds_training - validation.get("seconds", 0)),
        tokens_per_question=totals.tokens / max(totals.questions, 1),
        peak_memory_bytes=peak_bytes(trainer.args.device),
        seconds_training=seconds_training,
        seconds=time.perf_counter() - started,
    )


def _save_adapter(model: PeftModel, run: Run, best_adapter: BestAdapterCallback | None, step: int) -> None:
    """Move the best adapter, with its model card, to `run.adapter`, and the last to `run.last_adapter`.

    Without validation the last adapter is the best. `run.adapter` comes last: it marks the run as finished.
    """
    last = run.best_adapter(step)
    save_adapter(model, last)
    best = run.best_adapter(best_adapter.best["step"]) if best_adapter and best_adapter.best else last
    write_card(run, best)
    if best != last:
        put_in_place(last, run.last_adapter)
    put_in_place(best, run.adapter)
    shutil.rmtree(last.parent, ignore_errors=True)
