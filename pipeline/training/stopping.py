"""How a training that is told to stop saves first, and when it saves by the clock."""

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
    """While it is entered, Ctrl-C and SIGTERM ask for an end behind the step at hand; the second one ends at once."""

    def __init__(self) -> None:
        self.made = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python has signals handled nowhere else
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.made:
            raise KeyboardInterrupt
        self.made = True
        log_info(f"{signal.Signals(number).name}: stopping behind this step, to save first; once more stops at once")


class GracefulStopCallback(TrainerCallback):
    """Saves when stopping is asked for, then stops; saves also when the last checkpoint is `minutes` old."""

    def __init__(self, request: StopRequest, minutes: float | None) -> None:
        self.request, self.seconds = request, 60 * minutes if minutes else float("inf")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.saved_at = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.saved_at = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        due = time.monotonic() - self.saved_at >= self.seconds
        stops, saves = _any_process(self.request.made, due, args.device)
        self.request.made |= stops
        control.should_save |= stops or saves
        control.should_training_stop |= stops


def _any_process(stops: bool, saves: bool, device: torch.device) -> tuple[bool, bool]:
    """Whether one of the processes wants it: all of them must do it at the same step."""
    if world_size() == 1:
        return stops, saves
    wanted = torch.tensor([stops, saves], dtype=torch.int32, device=device)
    torch.distributed.all_reduce(wanted, torch.distributed.ReduceOp.MAX)
    return bool(wanted[0]), bool(wanted[1])
