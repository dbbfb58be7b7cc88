"""Selection of the device, on simulated GPUs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.blip2.device import _is_supported, check_devices, pick_device
from pipeline.common.errors import PipelineError

PASCAL, TURING, AMPERE, ADA, HOPPER, BLACKWELL = (6, 1), (7, 5), (8, 6), (8, 9), (9, 0), (12, 0)
BUILT = ["sm_75", "sm_80", "sm_86", "sm_90", "compute_90"]


class Gpus:
    """A simulation of torch.cuda."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capabilities: list[tuple[int, int]]) -> None:
        self.current = 0
        cuda = {
            "is_available": lambda: True,
            "device_count": lambda: len(capabilities),
            "set_device": self.set_device,
            "current_device": lambda: self.current,
            "get_device_capability": lambda device=None: capabilities[self.index(device)],
            "get_device_name": lambda device=None: f"GPU number {self.index(device)}",
            "get_device_properties": lambda device=None: SimpleNamespace(
                major=capabilities[self.index(device)][0], uuid=f"uuid-{self.index(device)}"
            ),
            "get_arch_list": lambda: BUILT,
        }
        for name, function in cuda.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch.version, "cuda", "13.0")

    def set_device(self, device: torch.device) -> None:
        self.current = self.index(device)

    def index(self, device: Any) -> int:
        if device is None:
            return self.current
        return device if isinstance(device, int) else torch.device(device).index


@pytest.mark.parametrize(("local_rank", "count", "index"), [("0", 2, 0), ("1", 2, 1), ("3", 4, 3), ("3", 1, 0)])
def test_rank_uses_its_gpu_as_the_current_device(
    monkeypatch: pytest.MonkeyPatch, local_rank: str, count: int, index: int
) -> None:
    """In the last case, CUDA_VISIBLE_DEVICES gives each rank a single GPU."""
    gpus = Gpus(monkeypatch, [AMPERE] * count)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert pick_device() == torch.device("cuda", index)
    assert gpus.current == index


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        (AMPERE, BUILT, True),
        (ADA, BUILT, True),  # sm_86 on 8.9
        (HOPPER, ["sm_90a"], True),
        (BLACKWELL, BUILT, True),  # compute_90, compiled by the driver
        ((12, 1), ["sm_120"], True),
        ((10, 3), ["sm_100f"], True),
        (PASCAL, BUILT, False),
        ((8, 0), ["sm_86"], False),
        (BLACKWELL, ["sm_90", "sm_100"], False),
        (BLACKWELL, ["sm_90a", "compute_90a"], False),
        (BLACKWELL, ["sm_100f", "compute_100f"], False),
        ((10, 3), ["sm_100a"], False),
    ],
)
def test_architectures_of_a_build_decide_where_it_runs(
    capability: tuple[int, int], built: list[str], runs: bool
) -> None:
    assert _is_supported(capability, built) == runs


def test_unsupported_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(monkeypatch, [AMPERE, PASCAL])
    assert pick_device().index == 0, "other GPUs are not checked"
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(PipelineError, match=r"cuda:1 \(GPU number 1\) has compute capability 6\.1, .*sm_75.* only\. .*"
                                            r"CUDA_VISIBLE_DEVICES="):  # fmt: skip
        pick_device()
    assert gpus.current == 0
    monkeypatch.setattr(torch.version, "cuda", None)  # as in a build for ROCm
    assert pick_device().index == 1


def test_accelerate_can_force_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpus(monkeypatch, [AMPERE])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert pick_device().type == "cpu"


class Others:
    """A context whose ranks report `reports`."""

    def __init__(self, *reports: tuple[str | None, str]) -> None:
        self.reports = reports

    def gather(self, report: tuple[str | None, str]) -> list[tuple[str | None, str]]:
        return [report, *self.reports]


def test_ranks_sharing_a_gpu_are_an_error_in_training_and_logged_in_stage_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Gpus(monkeypatch, [AMPERE])
    check_devices(Others(("uuid-1", "bfloat16")), "auto")  # type: ignore[arg-type]
    with pytest.raises(PipelineError, match="ranks 0 and 2 use the same GPU"):
        check_devices(Others(("uuid-1", "bfloat16"), ("uuid-0", "bfloat16")), "auto")  # type: ignore[arg-type]
    assert not capsys.readouterr().err
    check_devices(Others(("uuid-0", "")))  # type: ignore[arg-type]
    assert "ranks 0 and 1 use the same GPU" in capsys.readouterr().err


def test_ranks_with_different_dtypes_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpus(monkeypatch, [AMPERE])
    with pytest.raises(PipelineError, match=r"compute_dtype=auto is bfloat16, float16 on ranks 0 to 1"):
        check_devices(Others(("uuid-1", "float16")), "auto")  # type: ignore[arg-type]
    check_devices(Others(("uuid-1", "float16")), "float16")  # type: ignore[arg-type]


def test_ranks_on_a_cpu_do_not_count_as_sharing(capsys: pytest.CaptureFixture[str]) -> None:
    check_devices(Others((None, "float32"), (None, "float32")), "float32")  # type: ignore[arg-type]
    assert not capsys.readouterr().err
