"""The processes that `torchrun` or `accelerate launch` started together; one process is a team of one."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

from pipeline.errors import PipelineError

T = TypeVar("T")

SETTLING = 0.3  # seconds
PATIENCE = timedelta(days=30)  # the first to finish waits for the last, however long its share takes


def rank() -> int:
    """Number of this process among those started together, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Number of this process among those on this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


class Team:
    """Process 0 prepares, shares the work out and finishes; the others wait for their share.

    If process 0 fails before it has shared anything out, the others end without a word: it has said why.
    """

    def __init__(self) -> None:
        self.rank, self.size = rank(), world_size()
        self._shared = False

    def __enter__(self) -> "Team":
        if self.size > 1:
            from torch import distributed
            from torch.cuda import is_available

            backend = "cpu:gloo,cuda:nccl" if is_available() else "gloo"
            distributed.init_process_group(backend, timeout=PATIENCE)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.size > 1:
            from torch import distributed

            if error is None:
                # The group's threads let go of their last work, for which they need the interpreter's lock. Taken down
                # meanwhile by this thread, which has that lock, the group waits for them for ever.
                time.sleep(SETTLING)
                distributed.destroy_process_group()
            elif self.rank == 0 and not self._shared:  # else the others notice when this process is gone
                with suppress(PipelineError):  # the error at hand comes first
                    self._scatter([None] * self.size)

    def share_out(self, shares: list[T]) -> T:
        """In process 0: gives one share to each process, and returns its own."""
        self._shared = True
        if self.size > 1:
            self._scatter(list(shares))
        return shares[0]

    def receive(self, kind: type[T]) -> T:
        """In the others: the share that process 0 gives."""
        share = self._scatter([])
        if not isinstance(share, kind):
            self._scatter([])  # until process 0 has spoken and is gone: a launcher that sees another end kills it
            sys.exit(1)
        return share

    def gather(self, report: T) -> list[T]:
        """The reports of all processes, in process 0; nothing in the others."""
        if self.size == 1:
            return [report]
        from torch import distributed

        reports: list[T] | None = [report] * self.size if self.rank == 0 else None
        with self._others():
            distributed.gather_object(report, reports)
        return reports or []

    def _scatter(self, shares: list[Any]) -> Any:
        from torch import distributed

        received = [None]
        with self._others():
            distributed.scatter_object_list(received, shares if self.rank == 0 else None)
        return received[0]

    @contextmanager
    def _others(self) -> Iterator[None]:
        """Work with the others; if one of them is gone, it has said why, and process 0 alone says what that means."""
        try:
            yield
        except RuntimeError as error:  # gloo's
            if self.rank > 0:
                sys.exit(1)
            raise PipelineError(
                "another of the processes ended before its share was done; it, or torchrun, says why. What is written "
                "stays good: the same command goes on"
            ) from error
