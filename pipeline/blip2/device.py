"""Which device to compute on, and in which number format."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable

import torch

from pipeline.common.distributed import DistributedContext, local_rank
from pipeline.common.errors import PipelineError
from pipeline.common.progress import log_info


def pick_device() -> torch.device:
    """This process's GPU if there is one, else the CPU; of several processes on a machine each has its own GPU.

    The GPU becomes torch's current one: events, pinned memory and libraries that are not told a device take that.
    Raises `PipelineError` if torch's build holds no code for it.
    """
    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        return torch.device("cpu")  # the second: `accelerate launch --cpu`
    device = torch.device("cuda", local_rank() % torch.cuda.device_count())
    _require_code_for(device)
    torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`name` as a torch dtype; `auto` is bfloat16 if `device` computes in it, else float16 or, on a CPU, float32.

    A CPU without bfloat16 instructions emulates them, hundreds of times slower than float32.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float16` -> "float16"."""
    return str(dtype).removeprefix("torch.")


def check_devices(team: DistributedContext, training_dtype: str | None = None) -> None:
    """Compare the devices of all processes; each must call it.

    Processes that share a GPU are slow in stage one, which is logged. They cannot train together, nor can processes
    that compute in different number formats: with `training_dtype`, the config's, process 0 raises `PipelineError`.
    """
    device = pick_device()
    dtype = dtype_name(pick_dtype(training_dtype, device)) if training_dtype else ""
    found = team.gather((_identity_of(device), dtype))
    shared = _shared(gpu for gpu, _ in found)
    if shared:
        what = f"processes {' and '.join(map(str, shared))} compute on the same GPU"
        if training_dtype:
            raise PipelineError(f"{what}, which NCCL refuses: start at most one process for each GPU of a machine")
        log_info(f"{what}; one process for each GPU is faster")
    dtypes = [dtype for _, dtype in found]
    if len({*dtypes}) > 1:
        raise PipelineError(
            f"quantization.compute_dtype={training_dtype} is {', '.join(dtypes)} in processes 0 to {len(dtypes) - 1}, "
            "whose devices differ; name one that all of them have, as in quantization.compute_dtype=float16"
        )


def _identity_of(device: torch.device) -> str | None:
    """What a GPU is known by on any machine; None for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def _shared(gpus: Iterable[str | None]) -> list[int]:
    """The first processes found on one GPU; none if each has its own. `gpus`: by process."""
    processes = defaultdict(list)
    for process, gpu in enumerate(gpus):
        if gpu is not None:
            processes[gpu].append(process)
    return next((on_it for on_it in processes.values() if len(on_it) > 1), [])


def _require_code_for(device: torch.device) -> None:
    built = torch.cuda.get_arch_list() if torch.version.cuda else []  # ROCm has names of another kind
    capability = torch.cuda.get_device_capability(device)
    if built and not _runs_on(capability, built):
        raise PipelineError(
            f"{device} ({torch.cuda.get_device_name(device)}) has compute capability {capability[0]}.{capability[1]}, "
            f"and torch {torch.__version__} holds code for {', '.join(built)} only. Install a build of torch that has "
            "it (https://pytorch.org/get-started/previous-versions), choose another GPU with CUDA_VISIBLE_DEVICES, or "
            "compute on the CPU with CUDA_VISIBLE_DEVICES= (nothing behind it)"
        )


def _runs_on(capability: tuple[int, int], built: Iterable[str]) -> bool:
    """Whether one of `built`, as torch lists them, runs on a GPU of this compute capability.

    Machine code (sm_80) runs on the same major version, from its minor version on; PTX (compute_80) is compiled by the
    driver for what came later too. With the suffix a both run on that very capability alone, with f on its major
    version. See "Compute capabilities" in the CUDA C++ programming guide.
    """
    for kind, number, suffix in re.findall(r"\b(sm|compute)_(\d+)([af]?)\b", " ".join(built)):
        code = divmod(int(number), 10)
        carries_on = (kind, suffix) == ("compute", "") or (code[0] == capability[0] and suffix != "a")
        if code == capability or (code < capability and carries_on):
            return True
    return False
