"""Save a checkpoint before stopping on Ctrl-C or SIGTERM, and at time intervals."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.common.distributed import world_size
from pipeline.common.progress import log_info

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A context in which the first Ctrl-C or SIGTERM sets `requested`, and the second raises `KeyboardInterrupt`."""

    def __init__(self) -> None:
        """Start without a request."""
        self.requested = False
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        """Install the signal handlers, if this is the main thread; Python allows it in no other."""
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {number: signal.signal(number, self._handle_signal) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        name = signal.Signals(number).name
        log_info(f"{name}: saving a checkpoint after this step, then stopping. Repeat to stop without saving")


class GracefulStopCallback(TrainerCallback):
    """Saves and stops when a stop is requested on any rank, and saves every `save_minutes` minutes."""

    def __init__(self, stop: StopRequest, save_minutes: float | None) -> None:
        """Watch `stop`; `save_minutes` None disables saving by time."""
        self.stop, self.save_seconds = stop, 60 * save_minutes if save_minutes else float("inf")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock."""
        self.last_save_time = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Restart the clock."""
        self.last_save_time = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Have the trainer save and stop as requested."""
        save_is_due = time.monotonic() - self.last_save_time >= self.save_seconds
        should_stop, should_save = _any_rank(self.stop.requested, save_is_due, args.device)
        self.stop.requested |= should_stop
        control.should_save |= should_stop or should_save
        control.should_training_stop |= should_stop


def _any_rank(should_stop: bool, should_save: bool, device: torch.device) -> tuple[bool, bool]:
    """Return each flag if it is set on any rank: all ranks must save and stop at the same step."""
    if world_size() == 1:
        return should_stop, should_save
    flags = torch.tensor([should_stop, should_save], dtype=torch.int32, device=device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return bool(flags[0]), bool(flags[1])
