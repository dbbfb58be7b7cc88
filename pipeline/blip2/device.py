"""Selects the device and the dtype to compute with."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch

from pipeline.common.distributed import DistributedContext, local_rank
from pipeline.common.errors import PipelineError
from pipeline.common.progress import log_info


def pick_device() -> torch.device:
    """Return this rank's GPU if there is one, else the CPU.

    The GPU becomes torch's current device, which events, pinned memory and libraries use by default.

    Raises:
        PipelineError: this build of torch has no code for the GPU.
    """
    forced_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")  # `accelerate launch --cpu`
    if forced_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank() % torch.cuda.device_count())
    _check_architecture(device)
    torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the torch dtype of a name.

    `auto` is bfloat16 if the device has instructions for it, else float16 on a GPU and float32 on a CPU. A CPU that
    emulates bfloat16 is hundreds of times slower than in float32.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    capabilities = torch.cpu.get_capabilities()
    has_bfloat16 = capabilities.get("avx512_bf16") or capabilities.get("amx_tile")
    return torch.bfloat16 if has_bfloat16 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype: `torch.float16` -> "float16"."""
    return str(dtype).removeprefix("torch.")


def check_devices(dist: DistributedContext, training_dtype: str | None = None) -> None:
    """Compare the devices of all ranks. All ranks must call it.

    Args:
        dist: the ranks.
        training_dtype: `quantization.compute_dtype` of the config; None in stage one, where ranks that share a GPU are
            slow but work.

    Raises:
        PipelineError: in training, on rank 0, if ranks share a GPU or compute in different dtypes.
    """
    device = pick_device()
    dtype = dtype_name(pick_dtype(training_dtype, device)) if training_dtype else ""
    gathered = dist.gather((_gpu_uuid(device), dtype))
    sharing = _ranks_that_share([uuid for uuid, _ in gathered])
    if sharing:
        problem = f"ranks {' and '.join(map(str, sharing))} use the same GPU"
        if training_dtype:
            raise PipelineError(f"{problem}, which NCCL does not support: start at most one rank per GPU")
        log_info(f"{problem}; one rank per GPU is faster")
    dtypes = [dtype for _, dtype in gathered]
    if len({*dtypes}) > 1:
        raise PipelineError(
            f"quantization.compute_dtype={training_dtype} is {', '.join(dtypes)} on ranks 0 to {len(dtypes) - 1}, "
            "whose devices differ; set one that all of them support, such as quantization.compute_dtype=float16"
        )


def _gpu_uuid(device: torch.device) -> str | None:
    """Return the UUID of a GPU, or None for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def _ranks_that_share(uuids: Sequence[str | None]) -> list[int]:
    """Return the ranks of the first GPU that several ranks use, given the GPU of each rank."""
    ranks = defaultdict(list)
    for rank, uuid in enumerate(uuids):
        if uuid is not None:
            ranks[uuid].append(rank)
    return next((sharing for sharing in ranks.values() if len(sharing) > 1), [])


def _check_architecture(device: torch.device) -> None:
    built = torch.cuda.get_arch_list() if torch.version.cuda else []  # ROCm has other names
    capability = torch.cuda.get_device_capability(device)
    if built and not _is_supported(capability, built):
        raise PipelineError(
            f"{device} ({torch.cuda.get_device_name(device)}) has compute capability {capability[0]}.{capability[1]}, "
            f"but torch {torch.__version__} was built for {', '.join(built)} only. Install a build of torch that "
            "supports it (https://pytorch.org/get-started/previous-versions), choose another GPU with "
            "CUDA_VISIBLE_DEVICES, or use the CPU with an empty CUDA_VISIBLE_DEVICES="
        )


def _is_supported(capability: tuple[int, int], built: Iterable[str]) -> bool:
    """Return whether code built for one of these architectures runs on a GPU of this compute capability.

    Machine code (sm_80) runs on the same major version from its minor version on; PTX (compute_80) is compiled by the
    driver for later ones too. With the suffix "a" both run on exactly that capability, with "f" on its major version.
    See "Compute capabilities" in the CUDA C++ programming guide.
    """
    for kind, number, suffix in re.findall(r"\b(sm|compute)_(\d+)([af]?)\b", " ".join(built)):
        code = divmod(int(number), 10)
        is_forward_compatible = (kind, suffix) == ("compute", "") or (code[0] == capability[0] and suffix != "a")
        if code == capability or (code < capability and is_forward_compatible):
            return True
    return False
