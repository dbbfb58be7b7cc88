"""Memory: activations, free memory, peaks, and the estimate of a training."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.batches.sequences import pack
from pipeline.batches.split import open_split
from pipeline.blip2 import memory
from pipeline.blip2.base_model import load_base
from pipeline.blip2.language_model import add_lora
from pipeline.blip2.memory import (
    ActivationMemoryCounter,
    free_memory_bytes,
    is_out_of_memory,
    peak_bytes,
    reset_peak,
    split_on_out_of_memory,
)
from pipeline.common.errors import PipelineError
from pipeline.config import Config
from pipeline.training.estimate import _activation_bytes, _model_without_storage, _weight_bytes, estimate_training
from pipeline.training.micro_batches import max_tokens_that_fit

CPU = torch.device("cpu")


def test_activations_are_counted_once_and_without_weights() -> None:
    layer, inputs = nn.Linear(8, 8), torch.zeros(4, 8)
    with ActivationMemoryCounter(layer.parameters()) as saved:
        layer(inputs).sin().cos()
    assert saved.bytes == 3 * 4 * 8 * 4  # the layer's input, the inputs of sin and of cos


@pytest.mark.parametrize("free", [10**3, 10**8, 10**9, 1_010_000_000, 10**13])
def test_micro_batches_use_a_fraction_of_free_memory(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr("pipeline.training.micro_batches.free_memory_bytes", lambda device: free)
    nodes = max_tokens_that_fit(3e6, CPU)
    assert nodes == {10**3: 1, 10**8: 20, 10**9: 192, 1_010_000_000: 192, 10**13: 640}[free]


def test_ranks_on_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.training.micro_batches.free_memory_bytes", lambda device: 10**9)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert max_tokens_that_fit(3e6, CPU) == 48
    assert max_tokens_that_fit(3e6, torch.device("cuda", 1)) == 192, "each has a GPU of its own"


def test_memory_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    without = free_memory_bytes(CPU)
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert free_memory_bytes(CPU) == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory_bytes(CPU) == pytest.approx(without, rel=0.2)


def test_peak_is_measured_since_the_reset() -> None:
    reset_peak(CPU)
    before = peak_bytes(CPU)
    torch.ones(1 << 26)
    assert peak_bytes(CPU) > before + (1 << 27)
    reset_peak(CPU)
    assert peak_bytes(CPU) < before + (1 << 27)


def test_out_of_memory_on_a_cpu_is_detected() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert is_out_of_memory(error.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cudaErrorMemoryAllocation: out of memory"),
        RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("NCCL error: unhandled cuda error ... Cuda failure 2 'out of memory'"),
        RuntimeError("Error out of memory at line 380 in file /src/csrc/ops.cu"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4096 bytes."),
        RuntimeError("std::bad_alloc"),
        MemoryError("Unable to allocate 2.00 GiB for an array with shape (1,)"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_messages_of_out_of_memory_are_detected(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes do not fit"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: misaligned address"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        RuntimeError("input is not in contiguous memory format"),
        ValueError("a question about what is out of memory"),
        OSError("Cannot allocate memory"),
    ],
    ids=str,
)
def test_other_errors_about_memory_are_not_out_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_questions_that_do_not_fit_are_split(capsys: pytest.CaptureFixture[str]) -> None:
    def compute(numbers: Sequence[int]) -> list[int]:
        if len(numbers) > limit:
            raise MemoryError
        return list(numbers)

    limit = 3
    assert split_on_out_of_memory(compute, range(9), "") == [[0, 1], [2, 3], [4, 5], [6, 7, 8]]
    assert "out of memory with 9 questions at a time" in capsys.readouterr().err
    limit = 0
    with pytest.raises(PipelineError, match="out of memory with one question at a time; buy more"):
        split_on_out_of_memory(compute, range(9), "buy more")
    with pytest.raises(RuntimeError, match="illegal"):
        split_on_out_of_memory(lambda _: _raise(RuntimeError("illegal memory access")), range(9), "")


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_estimate_equals_the_measured_activations(cached: Config, dtype: str) -> None:
    config = cached.model_copy(update={"quantization": cached.quantization.model_copy(update={"compute_dtype": dtype})})
    sequences = open_split(config, "train").for_training(range(30))
    estimated = _activation_bytes(_model_without_storage(config, getattr(torch, dtype)), sequences)
    model = add_lora(load_base(config), **config.lora.model_dump()).train()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    with autocast, ActivationMemoryCounter(model.parameters()) as saved:
        model(**pack(sequences))
    assert estimated == pytest.approx(saved.bytes, rel=0.02)


def test_estimate_equals_the_size_of_the_weights(cached: Config) -> None:
    model = load_base(cached)
    loaded = sum(weight.nbytes for weight in model.parameters())
    scales = sum(
        state.absmax.nbytes + state.state2.absmax.nbytes
        for state in (getattr(weight, "quant_state", None) for weight in model.parameters())
        if state is not None
    )
    layout = _model_without_storage(cached, torch.float32)
    estimated = sum(_weight_bytes(name, weight, cached.quantization) for name, weight in layout.named_parameters())
    assert estimated == pytest.approx(loaded + scales, rel=0.01)


def test_dry_run_writes_nothing(cached: Config, tmp_path: Path) -> None:
    train = cached.train.model_copy(update={"output_dir": tmp_path / "runs", "batch_size": 20, "micro_batch": 5})
    told = estimate_training(cached.model_copy(update={"train": train}))
    assert (told.questions, told.steps) == (54, 4)
    assert told.questions_per_micro_batch <= 5
    assert told.memory_bytes["total"] == sum(told.memory_bytes.values()) / 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_estimate_is_within_15_percent() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "stage_two_memory.py"
    done = subprocess.run([sys.executable, script, "--size", "opt-350m"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout[-200:])
    told = json.loads(done.stdout[: done.stdout.rindex("}") + 1])
    assert told["estimate"]["memory_bytes"]["total"] == pytest.approx(told["measured"]["peak_memory_bytes"], rel=0.15)
