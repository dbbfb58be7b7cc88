"""Progress bars: one look for every stage, always on stderr."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from pipeline.common.distributed import rank

T = TypeVar("T")


def progress_bar(
    what: str, total: int, unit: str, done: int = 0, scaled: bool = False, delay: float = 0
) -> "tqdm[Any]":
    """A bar with rate and time left; on a terminal it is redrawn, in a log file it is a line now and then.

    `scaled` shows large numbers as k, M, G. What is over within `delay` seconds shows no bar.
    """
    on_terminal = sys.stderr.isatty()
    return tqdm(
        desc=what,
        total=total,
        disable=rank() > 0,
        initial=done,
        unit=f" {unit}",
        unit_scale=scaled,
        file=sys.stderr,
        dynamic_ncols=on_terminal,
        ncols=None if on_terminal else 100,
        mininterval=0.1 if on_terminal else delay or 10,
        delay=delay,
    )


def with_bar(what: str, items: Sequence[T], unit: str) -> Iterator[T]:
    """The items, with a bar if they take more than a moment."""
    with progress_bar(what, len(items), unit, delay=2) as bar:
        for item in items:
            yield item
            bar.update()


def log_info(line: str) -> None:
    """A line of log on stderr; of several processes the first alone speaks."""
    if rank() > 0:
        return
    tqdm.write(line, file=sys.stderr)


def log_warning(line: str) -> None:
    """Log a warning on rank 0."""
    log_info(line)
