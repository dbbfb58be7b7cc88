"""What a training tells while it runs: the progress bar, and `metrics.jsonl`."""

import math
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.common.distributed import world_size
from pipeline.common.progress import progress_bar
from pipeline.runs.checkpoints import mark_complete, remove_old
from pipeline.runs.run import Run, append_row, read_jsonl, write_rows


class MetricsCallback(TrainerCallback):
    """Also marks a checkpoint as complete, and only then removes older ones."""

    def __init__(self, run: Run, keep: int) -> None:
        """`keep` is the number of checkpoints that stay."""
        self.run, self.keep = run, keep
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar = progress_bar("training", state.max_steps, "steps", done=state.global_step)
        if state.is_world_process_zero:
            write_rows(read_jsonl(state.global_step, self.run.metrics), self.run.metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if world_size() > 1:
            torch.distributed.barrier()  # each process has written its part
        if state.is_world_process_zero:
            mark_complete(self.run.checkpoints / f"checkpoint-{state.global_step}")
            remove_old(self.run.checkpoints, self.keep)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
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
        if "loss" not in logs or not state.is_world_process_zero:
            return  # a look at validation, or the summary at the end
        row = {"step": state.global_step, **logs}
        append_row({key: value if math.isfinite(value) else None for key, value in row.items()}, self.run.metrics)
        assert self.bar is not None
        self.bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the progress bar, also of a training that failed: the error gets a line of its own."""
        if self.bar is not None:
            self.bar.close()
