"""The processes that `torchrun` or `accelerate launch` started together; one process is a team of one."""

import atexit
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

from pipeline.common.errors import PipelineError

T = TypeVar("T")

GROUP_TIMEOUT = timedelta(minutes=30)
"""For the processes to find each other, and for a collective of training.

Between two collectives a process computes its part of a step, answers its share of the validation's questions, loads
the model or writes a checkpoint: they take about as long in each.
"""
ENCODING_TIMEOUT = timedelta(days=30)
"""In stage one: all wait while process 0 reads the data set, and the first to finish for the last.

A process that dies meanwhile closes its connections, which ends the others' wait at once.
"""


def rank() -> int:
    """Number of this process among those started together, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Number of this process among those on this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many of the processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def exit_without_group_teardown() -> Iterator[None]:
    """End the process behind the block, if it is in a process group by then.

    The group's threads need the interpreter's lock to free what they worked on, and whoever frees the group waits for
    its threads. Where that is done under the lock, each waits for the other for ever: seldom, in
    `destroy_process_group`, in the destructor of DDP's reducer, or at the interpreter's end. So the group is never
    freed; it ends with its process.
    """
    try:
        yield
    except BaseException as error:
        _end_process(error)
        raise
    _end_process(None)


def _end_process(error: BaseException | None) -> None:
    """As Python ends a process, exit functions included, but without freeing anything; returns if in no group."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not (distributed.is_available() and distributed.is_initialized()):
        return
    if error is None or isinstance(error, SystemExit):
        code = error.code if error else 0
        status = code if isinstance(code, int) else int(code is not None)
    else:
        traceback.print_exception(error)
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class DistributedContext:
    """Process 0 prepares, shares the work out and finishes; the others wait for their share.

    If process 0 fails before it has shared anything out, the others end without a word: it has said why.
    """

    def __init__(self, timeout: timedelta = GROUP_TIMEOUT) -> None:
        """`timeout`: of a wait for what another process gives."""
        self.rank, self.size = rank(), world_size()
        self.timeout = timeout
        self._group: Any = None  # the default one
        self._shared = False

    def __enter__(self) -> "DistributedContext":
        if self.size > 1:
            from torch import distributed
            from torch.cuda import is_available

            if (
                not distributed.is_initialized()
            ):  # by an earlier stage in this process; see `exit_without_group_teardown`
                backend = "cpu:gloo,cuda:nccl" if is_available() else "gloo"
                distributed.init_process_group(backend, timeout=GROUP_TIMEOUT)
            if self.timeout != GROUP_TIMEOUT:
                self._group = distributed.new_group(timeout=self.timeout, backend="gloo")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.size > 1 and error is not None and self.rank == 0 and not self._shared:
            with suppress(PipelineError):  # the error at hand comes first
                self._scatter([None] * self.size)  # later the others notice when this process is gone

    def scatter(self, shares: list[T]) -> T:
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

    def broadcast(self, value: T) -> T:
        """Process 0's value, in all processes."""
        if self.size == 1:
            return value
        received: T = self._scatter([value] * self.size)
        return received

    def gather(self, report: T) -> list[T]:
        """The reports of all processes, in process 0; nothing in the others."""
        if self.size == 1:
            return [report]
        from torch import distributed

        reports: list[T] | None = [report] * self.size if self.rank == 0 else None
        with self.others():
            distributed.gather_object(report, reports, group=self._group)
        return reports or []

    @contextmanager
    def others(self, next_step: str = "the same command goes on") -> Iterator[None]:
        """Work with the others; if one of them is gone, it has said why, and process 0 alone says what that means."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _is_of_group(error):
                raise
            if self.rank > 0:
                sys.exit(1)
            raise PipelineError(
                "another of the processes ended before its share was done, or did not answer for "
                f"{self.timeout.total_seconds() / 60:.0f} minutes; it, or torchrun, says why. What is written stays "
                f"good: {next_step}"
            ) from error

    def _scatter(self, shares: list[Any]) -> Any:
        from torch import distributed

        received = [None]
        with self.others():
            distributed.scatter_object_list(received, shares if self.rank == 0 else None, group=self._group)
        return received[0]


def _is_of_group(error: RuntimeError) -> bool:
    """Whether the connection to another process is what failed. Gloo has no errors of its own, but names its source."""
    from torch import distributed

    return isinstance(error, distributed.DistError) or "gloo" in str(error)
