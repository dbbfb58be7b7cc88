"""How much memory there is, and how much of it a training step takes, by measure."""

import ctypes
import re
import resource
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from pipeline.common.errors import PipelineError
from pipeline.common.progress import log_info

T = TypeVar("T")

_M_MMAP_THRESHOLD = -3  # glibc's malloc.h
_LARGE_BLOCK = 1 << 20
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory"
    r"|_ALLOC_FAILED|ErrorMemoryAllocation|ErrorOutOfMemory|OUT_OF_HOST_MEMORY|bad_?alloc",
    re.IGNORECASE,
)
"""The words of torch (CUDA, HIP, CPU), cuBLAS, cuDNN and cuSPARSE (CUBLAS_STATUS_ALLOC_FAILED), NCCL, bitsandbytes."""
_CGROUP = Path("/sys/fs/cgroup")


class ActivationMemoryCounter:
    """Counts the bytes that a forward pass within it keeps for the backward pass, `known` tensors apart.

    Storage that is kept several times counts once.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}
        self._kept: list[Tensor] = []  # alive, so that no address is used twice
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)
        self.bytes = 0

    def __enter__(self) -> "ActivationMemoryCounter":
        self._hooks.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._hooks.__exit__(kind, error, tb)
        self._kept.clear()

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._kept.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


def free_memory_bytes(device: torch.device) -> int:
    """Memory that can still be taken on `device`: of a GPU, also what torch holds and does not use."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(psutil.virtual_memory().available, _free_in_container())


def reset_peak(device: torch.device) -> None:
    """Begins to count `peak_bytes` anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # elsewhere than on Linux the peak is that since the process began
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The most memory in use since `reset_peak`: torch's on a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        return 1024 * int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_no_freed_memory() -> None:
    """Has the C library give large blocks back to the system when they are freed, and not keep them for later.

    A step at the size of blip2-opt-2.7b takes 1.2 GB less so, and no more time. Where it is not glibc, nothing changes.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


def give_back_memory() -> None:
    """Has the C library give back what it keeps of freed memory."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory is out, of a GPU or the host; mostly that is a RuntimeError like any other."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def split_on_out_of_memory(compute: Callable[[Sequence[int]], T], questions: Sequence[int], advice: str) -> list[T]:
    """`compute(questions)` as a list of one; where memory is out, what it gives for two halves, or smaller parts.

    Raises `PipelineError` with `advice` if memory is too short for a single question.
    """
    try:
        return [compute(questions)]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(questions) == 1:
            raise PipelineError(f"out of memory with one question at a time; {advice}") from None
    torch.cuda.empty_cache()  # and the error, which holds on to memory, is gone
    log_info(f"out of memory with {len(questions)} questions at a time: they are computed in two halves")
    half = len(questions) // 2
    return split_on_out_of_memory(compute, questions[:half], advice) + split_on_out_of_memory(
        compute, questions[half:], advice
    )


def _free_in_container() -> int | Any:
    """What a container's own limit leaves; without one, all."""
    with suppress(OSError, ValueError):
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        return limit - used
    return float("inf")
