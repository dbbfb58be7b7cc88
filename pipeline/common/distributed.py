"""The ranks of a distributed run, as `torchrun` or `accelerate launch` start them. A single process is rank 0 of 1."""

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
"""Timeout of the rendezvous and of the collectives of training.

Between two collectives a rank computes its part of a step or of the validation, loads the model or writes a checkpoint,
which takes about equally long on all ranks.
"""
ENCODING_TIMEOUT = timedelta(days=30)
"""Timeout in stage one: all ranks wait while rank 0 reads the data set, and the first to finish waits for the last.

A rank that dies closes its connections, which ends the wait of the others at once.
"""
_FAILED = "rank 0 failed"


def rank() -> int:
    """Return the rank of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the rank of this process among those on this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of ranks."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Return the number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def exit_without_group_teardown() -> Iterator[None]:
    """End the process after the block if a process group was initialized in it, without freeing the group.

    The threads of a process group need the GIL to free their work, and freeing the group waits for its threads. If that
    happens under the GIL, the two wait for each other forever. This is rare, but happens in `destroy_process_group`, in
    the destructor of DDP's reducer and at the interpreter's exit. So the group ends with its process.
    """
    try:
        yield
    except BaseException as error:
        _exit_if_in_group(error)
        raise
    _exit_if_in_group(None)


def _exit_if_in_group(error: BaseException | None) -> None:
    """Exit as Python does, with the exit functions, but without freeing anything. Return if there is no group."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not (distributed.is_available() and distributed.is_initialized()):
        return
    from pipeline.common.compat import run_exit_functions

    if error is None or isinstance(error, SystemExit):
        code = error.code if error else 0
        status = code if isinstance(code, int) else int(code is not None)
    else:
        traceback.print_exception(error)
        status = 1
    run_exit_functions()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class DistributedContext:
    """The process group of a command: rank 0 prepares, all ranks compute, rank 0 finishes.

    If rank 0 fails before its first `scatter` or `broadcast`, the other ranks exit in theirs without a message, because
    rank 0 has printed the error.

    Args:
        timeout: timeout of a collective.
    """

    def __init__(self, timeout: timedelta = GROUP_TIMEOUT) -> None:
        self.rank, self.world_size = rank(), world_size()
        self.timeout = timeout
        self._group: Any = None  # the default one
        self._started = False
        """Whether rank 0 has sent anything."""

    def __enter__(self) -> "DistributedContext":
        """Initialize the process group if there are several ranks."""
        if self.world_size > 1:
            from torch import distributed
            from torch.cuda import is_available

            if not distributed.is_initialized():  # an earlier stage in this process may have left one
                backend = "cpu:gloo,cuda:nccl" if is_available() else "gloo"
                distributed.init_process_group(backend, timeout=GROUP_TIMEOUT)
            if self.timeout != GROUP_TIMEOUT:
                self._group = distributed.new_group(timeout=self.timeout, backend="gloo")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Release the other ranks if rank 0 has failed before it sent anything; later they notice a lost connection."""
        if self.world_size > 1 and error is not None and self.rank == 0 and not self._started:
            with suppress(PipelineError):  # `error` is the one to report
                self._scatter([_FAILED] * self.world_size)

    def scatter(self, values: list[T] | None = None) -> T:
        """Send one value to each rank and return this rank's. All ranks must call it; `values` is needed on rank 0."""
        if self.rank == 0:
            assert values is not None
            self._started = True
            if self.world_size > 1:
                self._scatter([(value,) for value in values])
            return values[0]
        received = self._scatter([])
        if received == _FAILED:
            self._scatter([])  # wait until rank 0 has exited: a launcher that sees another rank end first kills it
            sys.exit(1)
        value: T = received[0]
        return value

    def broadcast(self, value: T) -> T:
        """Return the value of rank 0 on all ranks. All ranks must call it."""
        return self.scatter([value] * self.world_size if self.rank == 0 else None)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks on rank 0, and an empty list elsewhere. All ranks must call it."""
        if self.world_size == 1:
            return [value]
        from torch import distributed

        values: list[T] | None = [value] * self.world_size if self.rank == 0 else None
        with self.handle_lost_ranks():
            distributed.gather_object(value, values, group=self._group)
        return values or []

    @contextmanager
    def handle_lost_ranks(self, next_step: str = "run the same command again to continue") -> Iterator[None]:
        """Turn a lost connection to another rank into a `PipelineError` on rank 0, and into a silent exit elsewhere."""
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or not _is_from_group(error):
                raise
            if self.rank > 0:
                sys.exit(1)
            raise PipelineError(
                "another rank exited early, or did not respond for "
                f"{self.timeout.total_seconds() / 60:.0f} minutes; see its error or torchrun's. Completed work is "
                f"saved: {next_step}"
            ) from error

    def _scatter(self, values: list[Any]) -> Any:
        from torch import distributed

        received = [None]
        with self.handle_lost_ranks():
            distributed.scatter_object_list(received, values if self.rank == 0 else None, group=self._group)
        return received[0]


def _is_from_group(error: RuntimeError) -> bool:
    """Return whether a connection to another rank failed. Gloo has no error class, but its messages name its source."""
    from torch import distributed

    return isinstance(error, distributed.DistError) or "gloo" in str(error)
