"""The loop of stage one: pictures are decoded ahead, encoded, and written behind, all at the same time."""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
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
from pipeline.data.tables import ImageSource
from pipeline.encoding.images import ImageError, ImageUnreachableError, Preprocessor, image_digest, read_image_bytes

TRIED = 8  # pictures, to tell in a moment how fast it will be
BATCHES_AHEAD = 2  # decoded while one is encoded: memory is theirs, whatever the number of pictures
LOOP_TIMES = ("waiting_for_images", "encoding", "waiting_for_disk")
BATCHES_TIMED = 3  # before the time for all is told; the first warms up


@dataclass
class EncodingReport:
    """What one process did."""

    rows: int = 0
    failures: dict[bytes, str] = field(default_factory=dict)
    """Digest of the picture -> why it has no features."""
    waiting_for_images: float = 0.0
    encoding: float = 0.0
    waiting_for_disk: float = 0.0
    """Seconds of the loop."""

    @property
    def seconds(self) -> float:
        return sum(getattr(self, name) for name in LOOP_TIMES)


@dataclass
class _Batch:
    """Some rows of a part on their way; a slot without a picture is black, so that the others' rounding stays."""

    part: PartWriter
    rows: range
    is_open: np.ndarray
    """(n,) bool: the rows to be written; a batch cut by a kill has others."""
    pixel_values: Tensor
    """(n, 3, H, W) float32."""
    slots: list["Future[None] | None"]


@dataclass
class _Launched:
    batch: _Batch
    failures: dict[int, str]
    features: Tensor
    """(n, Q, D) on the host, there once `event` has passed."""
    event: Any


class EncodingLoop:
    """Fills parts of a cache with the features of their pictures, in batches on the parts' fixed grid."""

    def __init__(self, encoder: Blip2Encoder, preprocess: Preprocessor, batch_size: int, workers: int) -> None:
        self.encoder, self.preprocess, self.batch_size = encoder, preprocess, batch_size
        self.device = pick_device()
        self.done = EncodingReport()
        self._in_work: list[PartWriter] = []  # one, or two where a batch of the next is being decoded
        self._decoders = ThreadPoolExecutor(max(1, workers), "decode")
        self._disk = ThreadPoolExecutor(1, "write")

    def fill(self, paths: Sequence[Path], pictures: Mapping[bytes, ImageSource]) -> EncodingReport:
        """Encodes what is open in the parts at `paths`, and seals them; `pictures`: by digest.

        Raises CacheError if the disk does not take it; what is written stays.
        """
        with ExitStack() as ending:  # in the reverse order: the threads end before the parts are closed
            ending.callback(self._close_parts)
            ending.callback(self._disk.shutdown, cancel_futures=True)
            ending.callback(self._decoders.shutdown, cancel_futures=True)
            total = sum(int((inspect_part(path).crc32 == NOT_WRITTEN).sum()) for path in paths)
            clock = _Clock(total)
            with progress_bar("encoding", total, "pictures") as bar, torch.inference_mode():
                for rows in self._encode(self._decode_ahead(paths, pictures)):
                    bar.update(rows)
                    clock.tick(rows)
        return self.done

    def images_per_second(self, pictures: Sequence[ImageSource]) -> float | None:
        """How fast the first pictures are read and encoded, a small batch of them, after one to warm up.

        None if none of them can be decoded.
        """
        some = pictures[: min(self.batch_size, TRIED)]
        with self._decoders, torch.inference_mode():
            for _ in range(2):
                started = time.perf_counter()
                decoded = [pixels for pixels in self._decoders.map(self._decode_if_good, some) if pixels is not None]
                if not decoded:
                    return None
                with _naming_batch_size(len(decoded)):
                    self.encoder(torch.from_numpy(np.stack(decoded)).to(self.device)).cpu()
        return len(decoded) / (time.perf_counter() - started)

    def _decode_if_good(self, picture: ImageSource) -> np.ndarray | None:
        try:
            return self.preprocess(read_image_bytes(picture))
        except ImageError:  # the run will leave it out, and say so
            return None

    def _encode(self, batches: Iterator[_Batch]) -> Iterator[int]:
        """Encodes and writes; -> rows stored or given up, batch by batch.

        CUDA is given a batch before the one before is waited for; the disk is waited for one batch later.
        """
        in_flight = 1 if self.device.type == "cuda" else 0
        launched: deque[_Launched] = deque()
        written: Future[int] | None = None
        for batch in chain(batches, [None]):
            if batch:
                launched.append(self._launch(batch))
            while len(launched) > (in_flight if batch else 0):
                features = self._fetch(launched[0])
                if written:
                    yield self._wait_for_disk(written)
                written = self._disk.submit(self._write, launched.popleft(), features)
        if written:
            yield self._wait_for_disk(written)

    def _decode_ahead(self, paths: Sequence[Path], pictures: Mapping[bytes, ImageSource]) -> Iterator[_Batch]:
        """The batches in order, each with its pictures decoded or being decoded."""
        ahead: deque[_Batch] = deque()
        for path in paths:
            part = PartWriter(path)
            self._in_work.append(part)
            for rows in part.unwritten_batches(self.batch_size):
                ahead.append(self._begin(part, rows, pictures))
                if len(ahead) > BATCHES_AHEAD:
                    yield ahead.popleft()
        yield from ahead

    def _begin(self, part: PartWriter, rows: range, pictures: Mapping[bytes, ImageSource]) -> _Batch:
        height, width = self.preprocess.size
        pixel_values = torch.zeros(len(rows), 3, height, width, pin_memory=self.device.type == "cuda")
        slots: list[Future[None] | None] = [None] * len(rows)
        for slot, row in enumerate(rows):
            digest = part.digests[row].tobytes()
            if digest in pictures:  # of a row stored before, the picture may not be wanted any more
                out = pixel_values[slot].numpy()
                slots[slot] = self._decoders.submit(self._decode, pictures[digest], digest, out)
        return _Batch(part, rows, part.crc32[rows.start : rows.stop] == NOT_WRITTEN, pixel_values, slots)

    def _decode(self, picture: ImageSource, digest: bytes, out: np.ndarray) -> None:
        try:
            data = read_image_bytes(picture)
            if image_digest(data) != digest:
                raise ImageError("changed since it was first read")
            out[...] = self.preprocess(data)
        except ImageUnreachableError as error:  # its mount may come back: its row must not be given up
            raise PipelineError(
                f"{picture}: {error}, though it could be read before. Nothing is given up: once it can be read again, "
                "run the same command again, and it goes on from here"
            ) from error

    def _launch(self, batch: _Batch) -> _Launched:
        failures = {}
        with _timed(self.done, "waiting_for_images"):
            for slot, future in enumerate(batch.slots):
                try:
                    if future:
                        future.result()
                except ImageError as error:
                    failures[slot] = str(error)
        with _timed(self.done, "encoding"), _naming_batch_size(len(batch.rows)):
            features = self.encoder(batch.pixel_values.to(self.device, non_blocking=True))
            features = features.to(getattr(torch, batch.part.spec.dtype))
            if self.device.type != "cuda":
                return _Launched(batch, failures, features, None)
            host = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
            host.copy_(features, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(features.device))  # that of the copy, whatever device is current
            return _Launched(batch, failures, host, event)

    def _fetch(self, launched: _Launched) -> np.ndarray:
        """The features as numpy stores them: bfloat16, which numpy lacks, as uint16."""
        with _timed(self.done, "encoding"):
            if launched.event:
                launched.event.synchronize()
        features = launched.features
        return (features.view(torch.uint16) if features.dtype == torch.bfloat16 else features).numpy()

    def _write(self, launched: _Launched, features: np.ndarray) -> int:
        """Stores what is open and good, gives up what has failed, seals the part when it is full; -> rows done with."""
        batch, part = launched.batch, launched.batch.part
        good = finite(features, part.spec)
        for slot in np.flatnonzero(~good).tolist():
            launched.failures.setdefault(slot, f"its features are not finite in {part.spec.dtype}")
        good[list(launched.failures)] = False
        rows = np.asarray(batch.rows)
        part.write(rows[good & batch.is_open], features[good & batch.is_open])
        self.done.rows += int((good & batch.is_open).sum())
        part.mark_failed(rows[~good & batch.is_open])
        if not part.unwritten_rows.size:
            part.seal()
            self._in_work.remove(part)
        for slot in np.flatnonzero(~good & batch.is_open).tolist():
            self.done.failures[part.digests[rows[slot]].tobytes()] = launched.failures[slot]
        return int(batch.is_open.sum())

    def _wait_for_disk(self, written: "Future[int]") -> int:
        with _timed(self.done, "waiting_for_disk"):
            return written.result()

    def _close_parts(self) -> None:
        for part in self._in_work:
            part.close()


class _Clock:
    """Says once, after the first batches, how long it all will take."""

    def __init__(self, total: int) -> None:
        self.total, self.ticks, self.rows, self.started = total, 0, 0, 0.0

    def tick(self, rows: int) -> None:
        self.ticks += 1
        if self.ticks == 1:
            self.started = time.perf_counter()
            return
        self.rows += rows
        if self.ticks == BATCHES_TIMED and self.rows:
            a_second = self.rows / (time.perf_counter() - self.started)
            log_info(
                f"{a_second:.3g} pictures a second: about {duration(self.total / a_second)} for {self.total} pictures"
            )


@contextmanager
def _naming_batch_size(pictures: int) -> Iterator[None]:
    """Raises `PipelineError` where memory is out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        advice = f"try precompute.batch_size={pictures // 2}" if pictures > 1 else "that is the least"
        raise PipelineError(
            f"out of memory with {pictures} pictures at a time; {advice}. What is written stays good: the same command "
            "goes on"
        ) from None


@contextmanager
def _timed(done: EncodingReport, name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        setattr(done, name, getattr(done, name) + time.perf_counter() - started)


def duration(seconds: float) -> str:
    """A time in words: 42 s, 12 min, 3 h 5 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
