"""Show a progress bar, append to `metrics.jsonl`, and mark checkpoints as complete."""

import math
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.common.distributed import world_size
from pipeline.common.progress import progress_bar
from pipeline.runs.checkpoints import mark_complete, remove_old
from pipeline.runs.jsonl import append_jsonl, read_jsonl, write_jsonl
from pipeline.runs.run import Run


class MetricsCallback(TrainerCallback):
    """Logs metrics, and marks each checkpoint as complete before it removes older ones.

    It must come after all callbacks that write into a checkpoint.
    """

    def __init__(self, run: Run, save_total_limit: int) -> None:
        """Log into `run` and keep its newest `save_total_limit` checkpoints."""
        self.run, self.save_total_limit = run, save_total_limit
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the progress bar; on resume, drop the rows of steps after the checkpoint."""
        self.bar = progress_bar("training", state.max_steps, "steps", done=state.global_step)
        if state.is_world_process_zero:
            write_jsonl(self.run.metrics, read_jsonl(self.run.metrics, state.global_step))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint as complete and remove old ones."""
        if world_size() > 1:
            torch.distributed.barrier()  # every rank has written its files
        if state.is_world_process_zero:
            mark_complete(self.run.checkpoints / f"checkpoint-{state.global_step}")
            remove_old(self.run.checkpoints, self.save_total_limit)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Advance the progress bar."""
        assert self.bar is not None
        self.bar.update()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **_: Any,
    ) -> None:
        """Append the metrics of a step; validation metrics and the final summary have no `loss`."""
        if "loss" not in logs or not state.is_world_process_zero:
            return
        row = {"step": state.global_step, **logs}
        append_jsonl(self.run.metrics, {key: value if math.isfinite(value) else None for key, value in row.items()})
        assert self.bar is not None
        self.bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the progress bar."""
        self.close()

    def close(self) -> None:
        """Close the progress bar; after a failure too, so that the error is printed on its own line."""
        if self.bar is not None:
            self.bar.close()
