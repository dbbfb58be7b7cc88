"""Progress bars and log messages, both on stderr."""

import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from tqdm.auto import tqdm

from pipeline.common.distributed import rank
from pipeline.common.terminal import warning_label

T = TypeVar("T")

LOG_FILE_INTERVAL = 10.0
"""Seconds between two lines of a progress bar in a log file."""
LOG_FILE_COLUMNS = 100

logger = logging.getLogger("pipeline")
"""Logger of all messages of the pipeline.

Messages are printed to stderr, whether a command or Python code runs. Python code can configure them with `logging`:
`logging.getLogger("pipeline").setLevel(logging.WARNING)` silences info messages, and a handler added to this logger or
to the root logger receives every message. If a handler of the root logger already prints to stdout or stderr, as after
`logging.basicConfig()`, messages are not printed twice.
"""


class TqdmHandler(logging.Handler):
    """Print messages to stderr without breaking progress bars."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Drop the message if a handler of the root logger prints it."""
        consoles = (sys.stdout, sys.stderr)
        printed = any(getattr(handler, "stream", None) in consoles for handler in logging.getLogger().handlers)
        return not printed and bool(super().filter(record))

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message, with a label if it is a warning."""
        label = warning_label() if record.levelno >= logging.WARNING else ""
        tqdm.write(label + record.getMessage(), file=sys.stderr)


logger.addHandler(TqdmHandler())
if logger.level == logging.NOTSET:
    logger.setLevel(logging.INFO)


def log_info(message: str) -> None:
    """Log a message, on rank 0 only."""
    if rank() == 0:
        logger.info(message)


def log_warning(message: str) -> None:
    """Log a warning, on rank 0 only."""
    if rank() == 0:
        logger.warning(message)


def progress_bar(
    description: str, total: int, unit: str, done: int = 0, scaled: bool = False, delay: float = 0
) -> "tqdm[Any]":
    """Return a progress bar with rate and remaining time, shown on rank 0 only.

    It is redrawn in a terminal and in a notebook. In a log file it prints a line every ten seconds.

    Args:
        description: text before the bar.
        total: number of units.
        unit: name of the unit, in the plural.
        done: units completed before the bar started.
        scaled: print large numbers with k, M or G.
        delay: seconds before the bar appears.
    """
    redrawn = sys.stderr.isatty() or "ipykernel" in sys.modules  # a notebook
    return tqdm(
        desc=description,
        total=total,
        disable=rank() > 0,
        initial=done,
        unit=f" {unit}",
        unit_scale=scaled,
        file=sys.stderr,
        dynamic_ncols=redrawn,
        ncols=None if redrawn else LOG_FILE_COLUMNS,
        mininterval=0.1 if redrawn else delay or LOG_FILE_INTERVAL,
        delay=delay,
    )


def with_bar(description: str, items: Sequence[T], unit: str) -> Iterator[T]:
    """Yield the items, with a progress bar if they take more than two seconds."""
    with progress_bar(description, len(items), unit, delay=2) as bar:
        for item in items:
            yield item
            bar.update()
