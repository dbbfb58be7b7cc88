"""Map the config's `train` section to transformers' `TrainingArguments`."""

import torch
from transformers import TrainingArguments

from pipeline.blip2.device import pick_device
from pipeline.common.compat import checkpointing_arguments
from pipeline.common.distributed import GROUP_TIMEOUT
from pipeline.config import TrainConfig
from pipeline.runs.run import Run


def training_arguments(settings: TrainConfig, run: Run, compute_dtype: torch.dtype) -> TrainingArguments:
    """Return the arguments of a training.

    Args:
        settings: the config's `train` section.
        run: checkpoints go into its folder, trackers show its name.
        compute_dtype: the dtype of the frozen model, which automatic mixed precision uses.
    """
    is_float16 = compute_dtype == torch.float16
    arguments = TrainingArguments(
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
    if arguments.n_gpu > 1:  # one GPU per rank: DataParallel cannot copy 4-bit weights
        arguments._n_gpu = 1
    return arguments
