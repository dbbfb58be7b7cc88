"""The encoding loop on a simulated GPU, and when memory is exhausted."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pipeline.encoding.encoding_loop
from cache.audit import verify
from pipeline.blip2.encoder import Blip2Encoder
from pipeline.commands.precompute import estimate_precompute, precompute
from pipeline.common.errors import PipelineError
from pipeline.config import load_config
from pipeline.encoding.encoding_loop import EncodingLoop

FEATURES = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
DEVICE = torch.device("cuda", 1)


class Stream:
    """A CUDA stream that runs its work when it is synchronized, not before."""

    def __init__(self) -> None:
        self.given: list[Callable[[], object]] = []

    def finish(self) -> None:
        while self.given:
            self.given.pop(0)()


class Machine:
    """Two GPUs, of which the first is the current device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.streams = {torch.device("cuda", index): Stream() for index in (0, 1)}
        monkeypatch.setattr(pipeline.encoding.encoding_loop, "pick_device", lambda: DEVICE)
        monkeypatch.setattr(torch, "empty", lambda *_, **__: Host(self))
        monkeypatch.setattr(torch.cuda, "Event", lambda: Event(self))
        monkeypatch.setattr(torch.cuda, "current_stream", self.current_stream)

    def current_stream(self, device: torch.device | None = None) -> Stream:
        return self.streams[device or torch.device("cuda", 0)]


class Event:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or self.machine.current_stream()

    def synchronize(self) -> None:
        self.stream.finish()


class Host:
    """Pinned memory, filled when the stream of the copy runs."""

    dtype = torch.float32

    def __init__(self, machine: Machine) -> None:
        self.machine, self.there = machine, np.zeros_like(FEATURES)

    def copy_(self, source: Any, non_blocking: bool) -> None:
        assert non_blocking
        self.machine.streams[source.device].given.append(lambda: np.copyto(self.there, source.values))

    def numpy(self) -> np.ndarray:
        return self.there


class OnDevice:
    """Features on GPU 1."""

    device, dtype, shape, values = DEVICE, torch.float32, FEATURES.shape, FEATURES

    def to(self, dtype: torch.dtype) -> "OnDevice":
        assert dtype == self.dtype
        return self


def test_features_are_read_after_the_copy_from_their_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch)
    loop = EncodingLoop(lambda pixels: OnDevice(), None, 2, 1)  # type: ignore[arg-type, return-value]
    batch = SimpleNamespace(
        decoding=[None, None],
        rows=range(2),
        pixel_values=SimpleNamespace(to=lambda device, non_blocking: device),
        part=SimpleNamespace(spec=SimpleNamespace(dtype="float32")),
    )
    launched = loop._forward(batch)  # type: ignore[arg-type]
    assert not launched.features.numpy().any(), "the copy has not run yet"
    assert (loop._features_of(launched) == FEATURES).all()


def test_out_of_memory_suggests_a_batch_size_and_keeps_written_rows(
    data_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(data_set / "config.yaml", ["cache.part_rows=10"])
    forward, batches = Blip2Encoder.forward, []

    def short(self: Blip2Encoder, pixel_values: Tensor) -> Tensor:
        batches.append(len(pixel_values))
        if len(batches) > 2:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return forward(self, pixel_values)

    with monkeypatch.context() as patch:
        patch.setattr(Blip2Encoder, "forward", short)
        with pytest.raises(PipelineError, match=r"out of memory with a batch of 8 images. Try precompute.batch_size=4"):
            precompute(config)
        with pytest.raises(PipelineError, match="out of memory"):
            estimate_precompute(config)
    assert precompute(config).reused > 0
    assert not verify(config.cache.dir).damage


def test_other_gpu_errors_are_raised_unchanged(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Blip2Encoder, "forward", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        precompute(load_config(data_set / "config.yaml"))
