"""What a training tells while it runs: the progress bar, and `metrics.jsonl`."""

import math
from contextlib import ExitStack
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.progress import progress_bar
from pipeline.run_folder import RunFolder, append_row, rows_until, write_rows
from pipeline.team import world_size


class RunLog(TrainerCallback):
    """Also says of a checkpoint that it is whole."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self._ending = ExitStack()

    def close(self) -> None:
        """End the bar, however the training ended, so that what is printed next has a line of its own."""
        self._ending.close()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar = progress_bar("training", state.max_steps, "steps", done=state.global_step)
        self._ending.callback(self.bar.close)
        if state.is_world_process_zero:
            write_rows(rows_until(state.global_step, self.run.metrics), self.run.metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if world_size() > 1:
            torch.distributed.barrier()  # each process has written its part
        if state.is_world_process_zero:
            self.run.mark_whole(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
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
        self.bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
