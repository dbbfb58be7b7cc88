"""The encoding loop of stage one: images are decoded ahead, encoded, and written in the background, all in parallel."""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache.format import NOT_WRITTEN, inspect_part
from cache.part import PartWriter, finite
from pipeline.blip2.device import pick_device
from pipeline.blip2.encoder import Blip2Encoder
from pipeline.blip2.memory import is_out_of_memory
from pipeline.common.errors import PipelineError
from pipeline.common.progress import log_info, progress_bar
from pipeline.data.image_sources import ImageSource
from pipeline.encoding.images import ImageError, ImageUnreachableError, Preprocessor, image_digest, read_image_bytes

MAX_TIMED_IMAGES = 8
"""Images of the speed estimate of a dry run."""
BATCHES_AHEAD = 2
"""Batches decoded while one is encoded; they bound the memory, whatever the number of images."""
BATCHES_BEFORE_ESTIMATE = 3
"""Batches before the total time is logged; the first is a warm-up and not counted."""


@dataclass(frozen=True)
class EncodingReport:
    """What one rank encoded, and where its time went, in seconds."""

    rows: int = 0
    failures: Mapping[bytes, str] = field(default_factory=dict)
    """Digest of each image without features -> the reason."""
    waiting_for_images: float = 0.0
    encoding: float = 0.0
    waiting_for_disk: float = 0.0

    @property
    def seconds(self) -> float:
        """Duration of the loop."""
        return self.waiting_for_images + self.encoding + self.waiting_for_disk


@dataclass
class _Batch:
    """Rows of a part whose images are being decoded.

    A slot without an image stays black: the batch keeps its shape, so that the other rows round the same.
    """

    part: PartWriter
    rows: range
    is_unwritten: np.ndarray
    """(n,) bool: the rows to write. In a batch that an interrupted run wrote in part, the others are stored already."""
    pixel_values: Tensor
    """(n, 3, H, W) float32."""
    decoding: list["Future[None] | None"]
    """Per slot."""


@dataclass
class _EncodedBatch:
    """A batch on its way from the device."""

    batch: _Batch
    failures: dict[int, str]
    """Slot -> reason."""
    features: Tensor
    """(n, Q, D) on the host, valid after `event`."""
    event: Any


class _Stopwatch:
    """Sum of the seconds spent in its `with` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.seconds += time.perf_counter() - self._started


class EncodingLoop:
    """Fills parts of a cache with query features, in batches aligned to the start of each part."""

    def __init__(self, encoder: Blip2Encoder, preprocess: Preprocessor, batch_size: int, workers: int) -> None:
        """Create the loop.

        Args:
            encoder: the encoder half, on this process's device.
            preprocess: the image processing of its checkpoint.
            batch_size: images per batch.
            workers: decoding threads; at least one is used.
        """
        self.encoder, self.preprocess, self.batch_size = encoder, preprocess, batch_size
        self.device = pick_device()
        self._rows = 0
        self._failures: dict[bytes, str] = {}
        self._image_wait, self._encoding_time, self._disk_wait = _Stopwatch(), _Stopwatch(), _Stopwatch()
        self._open_parts: list[PartWriter] = []  # one, or two while a batch of the next one is being decoded
        self._pending_write: Future[int] | None = None
        self._decoders = ThreadPoolExecutor(max(1, workers), "decode")
        self._writer = ThreadPoolExecutor(1, "write")

    def fill(self, paths: Sequence[Path], images: Mapping[bytes, ImageSource]) -> EncodingReport:
        """Encode the unwritten rows of the parts at `paths`, and seal the parts.

        Args:
            paths: the parts.
            images: digest -> image; rows of other digests are not encoded.

        Raises:
            CacheError: the disk accepts no writes. Rows written before are kept.
            PipelineError: an image cannot be read any more, or out of memory.
        """
        with ExitStack() as cleanup:  # in reverse order: the threads end before the parts are closed
            cleanup.callback(self._close_parts)
            cleanup.callback(self._writer.shutdown, cancel_futures=True)
            cleanup.callback(self._decoders.shutdown, cancel_futures=True)
            total = sum(int((inspect_part(path).crc32 == NOT_WRITTEN).sum()) for path in paths)
            time_estimate = _TimeEstimate(total)
            with progress_bar("encoding", total, "images") as bar, torch.inference_mode():
                for rows in self._encode(self._decode_ahead(paths, images)):
                    bar.update(rows)
                    time_estimate.update(rows)
        return EncodingReport(
            self._rows,
            self._failures,
            self._image_wait.seconds,
            self._encoding_time.seconds,
            self._disk_wait.seconds,
        )

    def images_per_second(self, images: Sequence[ImageSource]) -> float | None:
        """Measure the speed on a small batch of the first images, after a warm-up; None if none can be decoded."""
        sample = images[: min(self.batch_size, MAX_TIMED_IMAGES)]
        with self._decoders, torch.inference_mode():
            for _ in range(2):
                started = time.perf_counter()
                decoded = [pixels for pixels in self._decoders.map(self._try_decode, sample) if pixels is not None]
                if not decoded:
                    return None
                with _advising_on_memory(len(decoded)):
                    self.encoder(torch.from_numpy(np.stack(decoded)).to(self.device)).cpu()
        return len(decoded) / (time.perf_counter() - started)

    def _try_decode(self, image: ImageSource) -> np.ndarray | None:
        try:
            return self.preprocess(read_image_bytes(image))
        except ImageError:  # reported by the run itself
            return None

    def _encode(self, batches: Iterator[_Batch]) -> Iterator[int]:
        """Encode and write all batches; yield the number of finished rows of each, once it is written.

        On CUDA the next batch is submitted before the results of the previous one are awaited.
        """
        max_in_flight = 1 if self.device.type == "cuda" else 0
        in_flight: deque[_EncodedBatch] = deque()
        for batch in batches:
            in_flight.append(self._forward(batch))
            if len(in_flight) > max_in_flight:
                yield from self._write_in_background(in_flight.popleft())
        for encoded in in_flight:
            yield from self._write_in_background(encoded)
        yield from self._await_write()

    def _write_in_background(self, encoded: _EncodedBatch) -> Iterator[int]:
        """Start to write a batch after the previous one is written; yield the rows of the previous one."""
        features = self._features_of(encoded)
        yield from self._await_write()
        self._pending_write = self._writer.submit(self._write, encoded, features)

    def _await_write(self) -> Iterator[int]:
        if self._pending_write is not None:
            with self._disk_wait:
                rows = self._pending_write.result()
            self._pending_write = None
            yield rows

    def _decode_ahead(self, paths: Sequence[Path], images: Mapping[bytes, ImageSource]) -> Iterator[_Batch]:
        """Yield the batches in order, while the images of the next ones are being decoded."""
        ahead: deque[_Batch] = deque()
        for path in paths:
            part = PartWriter(path)
            self._open_parts.append(part)
            for rows in part.unwritten_batches(self.batch_size):
                ahead.append(self._start_decoding(part, rows, images))
                if len(ahead) > BATCHES_AHEAD:
                    yield ahead.popleft()
        yield from ahead

    def _start_decoding(self, part: PartWriter, rows: range, images: Mapping[bytes, ImageSource]) -> _Batch:
        height, width = self.preprocess.size
        pixel_values = torch.zeros(len(rows), 3, height, width, pin_memory=self.device.type == "cuda")
        decoding: list[Future[None] | None] = [None] * len(rows)
        for slot, row in enumerate(rows):
            digest = part.digests[row].tobytes()
            if digest in images:  # no question may need the image of a row that was stored before
                out = pixel_values[slot].numpy()
                decoding[slot] = self._decoders.submit(self._decode, images[digest], digest, out)
        return _Batch(part, rows, part.crc32[rows.start : rows.stop] == NOT_WRITTEN, pixel_values, decoding)

    def _decode(self, image: ImageSource, digest: bytes, out: np.ndarray) -> None:
        try:
            data = read_image_bytes(image)
            if image_digest(data) != digest:
                raise ImageError("changed since it was first read")
            out[...] = self.preprocess(data)
        except ImageUnreachableError as error:  # it may be back in a moment: its row must not be marked as failed
            raise PipelineError(
                f"{image}: {error}, though it could be read before. Completed work is saved. Once the image can be "
                "read again, run the same command again to continue"
            ) from error

    def _forward(self, batch: _Batch) -> _EncodedBatch:
        """Encode a batch. On CUDA this only submits the work."""
        failures = {}
        with self._image_wait:
            for slot, future in enumerate(batch.decoding):
                try:
                    if future:
                        future.result()
                except ImageError as error:
                    failures[slot] = str(error)
        with self._encoding_time, _advising_on_memory(len(batch.rows)):
            features = self.encoder(batch.pixel_values.to(self.device, non_blocking=True))
            features = features.to(getattr(torch, batch.part.spec.dtype))
            if self.device.type != "cuda":
                return _EncodedBatch(batch, failures, features, None)
            host = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
            host.copy_(features, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(features.device))  # the stream of the copy, not the current device's
            return _EncodedBatch(batch, failures, host, event)

    def _features_of(self, encoded: _EncodedBatch) -> np.ndarray:
        """Wait for the features, (n, Q, D); bfloat16, which numpy lacks, is returned as uint16."""
        with self._encoding_time:
            if encoded.event:
                encoded.event.synchronize()
        features = encoded.features
        return (features.view(torch.uint16) if features.dtype == torch.bfloat16 else features).numpy()

    def _write(self, encoded: _EncodedBatch, features: np.ndarray) -> int:
        """Write the unwritten rows of a batch, mark those that failed, and seal the part once it is full.

        Returns:
            The number of rows written or marked.
        """
        batch, part = encoded.batch, encoded.batch.part
        is_good = finite(features, part.spec)
        for slot in np.flatnonzero(~is_good).tolist():
            encoded.failures.setdefault(slot, f"its features are not finite in {part.spec.dtype}")
        is_good[list(encoded.failures)] = False
        rows = np.asarray(batch.rows)
        written, failed = is_good & batch.is_unwritten, ~is_good & batch.is_unwritten
        part.write(rows[written], features[written])
        self._rows += int(written.sum())
        part.mark_failed(rows[failed])
        if not part.unwritten_rows.size:
            part.seal()
            self._open_parts.remove(part)
        for slot in np.flatnonzero(failed).tolist():
            self._failures[part.digests[rows[slot]].tobytes()] = encoded.failures[slot]
        return int(batch.is_unwritten.sum())

    def _close_parts(self) -> None:
        for part in self._open_parts:
            part.close()


class _TimeEstimate:
    """Logs the estimated total time once, after the first batches."""

    def __init__(self, total: int) -> None:
        self.total, self.batches, self.rows, self.started = total, 0, 0, 0.0

    def update(self, rows: int) -> None:
        """Count a finished batch."""
        self.batches += 1
        if self.batches == 1:
            self.started = time.perf_counter()
            return
        self.rows += rows
        if self.batches == BATCHES_BEFORE_ESTIMATE and self.rows:
            rate = self.rows / (time.perf_counter() - self.started)
            log_info(f"{rate:.3g} images/s: about {format_duration(self.total / rate)} for {self.total} images")


@contextmanager
def _advising_on_memory(batch_size: int) -> Iterator[None]:
    """Turn an out-of-memory error into a `PipelineError` that suggests a smaller batch."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        advice = f"Try precompute.batch_size={batch_size // 2}" if batch_size > 1 else "The batch cannot be smaller"
        raise PipelineError(
            f"out of memory with a batch of {batch_size} images. {advice}. Completed work is saved; run the same "
            "command again to continue"
        ) from None


def format_duration(seconds: float) -> str:
    """Format a time as "42 s", "12 min" or "3 h 5 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
