"""Measures free memory, peak memory and the activation memory of a forward pass; retries when memory runs out."""

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from cache import portability
from pipeline.common.compat import storage_id
from pipeline.common.errors import PipelineError
from pipeline.common.progress import log_info

T = TypeVar("T")

_LARGE_BLOCK = 1 << 20
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory"
    r"|_ALLOC_FAILED|ErrorMemoryAllocation|ErrorOutOfMemory|OUT_OF_HOST_MEMORY|bad_?alloc",
    re.IGNORECASE,
)
"""Messages of torch (CUDA, HIP, CPU), cuBLAS, cuDNN and cuSPARSE (CUBLAS_STATUS_ALLOC_FAILED), NCCL, bitsandbytes."""
_CGROUP = Path("/sys/fs/cgroup")


class ActivationMemoryCounter:
    """Context manager that counts the bytes which a forward pass keeps for the backward pass.

    A storage that is kept several times counts once.

    Args:
        known: tensors that do not count, such as the weights.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._seen = {storage_id(tensor) for tensor in known}
        self._kept: list[Tensor] = []  # kept alive, so that no id is used twice
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)
        self.bytes = 0

    def __enter__(self) -> "ActivationMemoryCounter":
        """Start counting."""
        self._hooks.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Stop counting."""
        self._hooks.__exit__(kind, error, tb)
        self._kept.clear()

    def _count(self, tensor: Tensor) -> Tensor:
        storage = storage_id(tensor)
        if storage not in self._seen:
            self._seen.add(storage)
            self._kept.append(tensor)
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor


def free_memory_bytes(device: torch.device) -> int:
    """Return the memory that can be allocated on `device`, including what torch has reserved but not allocated."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(psutil.virtual_memory().available, _free_in_container())


def reset_peak(device: torch.device) -> None:
    """Reset `peak_bytes`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        portability.reset_peak_resident_bytes()


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory since `reset_peak`: allocated by torch on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return portability.peak_resident_bytes() or psutil.Process().memory_info().rss


def keep_no_freed_memory() -> None:
    """Has the C library give large blocks back to the system when they are freed, and not keep them for later.

    A step at the size of blip2-opt-2.7b takes 1.2 GB less so, and no more time. Where it is not glibc, nothing changes.
    """
    portability.set_malloc_mmap_threshold(_LARGE_BLOCK)


def give_back_memory() -> None:
    """Has the C library give back what it keeps of freed memory."""
    portability.trim_malloc()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` means that a GPU or the host is out of memory; often it is a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def split_on_out_of_memory(compute: Callable[[Sequence[int]], T], questions: Sequence[int], advice: str) -> list[T]:
    """Return `[compute(questions)]`; when out of memory, split the questions in halves until each part fits.

    Raises:
        PipelineError: a single question does not fit; the message ends with `advice`.
    """
    try:
        return [compute(questions)]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(questions) == 1:
            raise PipelineError(f"out of memory with one question at a time; {advice}") from None
    torch.cuda.empty_cache()  # here the error, which keeps tensors alive, is released
    log_info(f"out of memory with {len(questions)} questions at a time; retrying in two halves")
    middle = len(questions) // 2
    return split_on_out_of_memory(compute, questions[:middle], advice) + split_on_out_of_memory(
        compute, questions[middle:], advice
    )


def _free_in_container() -> int | Any:
    """Return the memory below the limit of the container, or infinity without a limit."""
    with suppress(OSError, ValueError):
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        return limit - used
    return float("inf")
