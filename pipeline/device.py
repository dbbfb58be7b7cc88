"""Which device to compute on, and in which number format."""

import os

import torch


def pick_device() -> torch.device:
    """This process's GPU if there is one, else the CPU; of several processes on a machine each has its own GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


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
