"""Stage one against the encoder alone: JPEGs of 640 x 480 on disk -> cache, and the bare forward on resident pixels.

    python tests/benchmarks/stage_one.py                        # the embedded checkpoint
    python tests/benchmarks/stage_one.py --size vit-g           # ViT-g + Q-Former at real size, random weights

Both do the same batches, in turns, in one run. Stage one is the loop of `pipe precompute` with all that belongs to
it: reading, digest, decoding, preprocessing, encoding, CRC, writing, flushing, sealing. Beside them stands what
reading and decoding alone do on the same threads: what stage one could reach if encoding were free.
"""

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from transformers import Blip2Config

from cache.spec import CacheSpec
from cache.writer import FeatureWriter
from pipeline.blip2.checkpoint import ENCODER_PREFIXES, fingerprint
from pipeline.blip2.device import dtype_name, pick_device, pick_dtype
from pipeline.blip2.embedded import embedded_checkpoint
from pipeline.blip2.encoder import Blip2Encoder, load_encoder
from pipeline.encoding.encoding_loop import EncodingLoop, EncodingReport
from pipeline.encoding.images import Preprocessor, image_digest, read_image_bytes


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    device = pick_device()
    dtype = pick_dtype(options.dtype, device)
    with TemporaryDirectory(dir=options.folder) as name:
        images = write_jpegs(Path(name) / "images", options.images)
        encoder, preprocess = build(options.size, device, dtype)
        spec = spec_of(encoder, preprocess, dtype)
        first = [preprocess(read_image_bytes(path)) for path in images[: options.batch]]
        resident = torch.from_numpy(np.stack(first)).to(device)
        bare(encoder, resident, options.batch)  # warms up
        times: dict[str, list[float]] = {"bare": [], "stage one": [], "decoding alone": []}
        for turn in range(options.turns):
            times["bare"].append(bare(encoder, resident, options.images))
            stage = EncodingLoop(encoder, preprocess, options.batch, options.workers)
            seconds, last = stage_one(stage, Path(name) / f"cache{turn}", spec, images)
            times["stage one"].append(seconds)
            times["decoding alone"].append(decoding(preprocess, images, options.workers))
    report(options, times, dtype, last)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["embedded", "vit-g"], default="embedded")
    parser.add_argument("--images", type=int, help="default: 1,024, or 8 at real size")
    parser.add_argument("--batch", type=int, help="default: 64, or 4 at real size")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--folder", type=Path, help="where the images and the cache go for the time being")
    options = parser.parse_args()
    options.images = options.images or {"embedded": 1024, "vit-g": 8}[options.size]
    options.batch = options.batch or {"embedded": 64, "vit-g": 4}[options.size]
    return options


def write_jpegs(folder: Path, count: int) -> list[Path]:
    """Images with structure at several scales, so that a file has the tens of KB of a photograph."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for path in paths:
        layers = [
            np.asarray(Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)).resize((640, 480), 3), np.float32)
            for h, w in ((3, 4), (24, 32), (120, 160))
        ]
        pixels = np.average(layers, axis=0, weights=[4, 2, 1]).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=90)
    return paths


def build(size: str, device: torch.device, dtype: torch.dtype) -> tuple[Blip2Encoder, Preprocessor]:
    """The encoder, and its preprocessing, which differs in size alone."""
    preprocess = Preprocessor(embedded_checkpoint())
    if size == "embedded":
        return load_encoder(embedded_checkpoint(), device, dtype), preprocess
    config = Blip2Config()  # its defaults are the real sizes: ViT-g/14 at 224 pixels, a Q-Former of 12 layers
    preprocess.size = (config.vision_config.image_size,) * 2
    with torch.device(device):
        encoder = Blip2Encoder._from_config(config, dtype=dtype)
    return encoder.eval().requires_grad_(False), preprocess


def spec_of(encoder: Blip2Encoder, preprocess: Preprocessor, dtype: torch.dtype) -> CacheSpec:
    return CacheSpec(
        encoder_fingerprint=fingerprint(embedded_checkpoint(), ENCODER_PREFIXES),
        encoder_dtype=dtype_name(dtype),
        image_preprocessing=preprocess.settings_json(),
        query_tokens=encoder.config.num_query_tokens,
        width=encoder.config.qformer_config.hidden_size,
        dtype="float16",
    )


@torch.inference_mode()
def bare(encoder: Blip2Encoder, pixel_values: torch.Tensor, images: int) -> float:
    """Seconds for the forward pass alone, as often as there are batches."""
    started = time.perf_counter()
    for start in range(0, images, len(pixel_values)):
        encoder(pixel_values[: images - start])
    if pixel_values.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def stage_one(stage: EncodingLoop, folder: Path, spec: CacheSpec, images: list[Path]) -> tuple[float, EncodingReport]:
    """Return the seconds from an empty cache to sealed parts, and where they went."""
    digests = {image_digest(read_image_bytes(path)): path for path in images}
    with FeatureWriter(folder, spec, list(digests)) as writer:
        started = time.perf_counter()
        done = stage.fill(writer.parts, digests)
        seconds = time.perf_counter() - started
    assert done.rows == len(images), "every image was encoded"
    return seconds, done


def decoding(preprocess: Preprocessor, images: list[Path], workers: int) -> float:
    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(lambda path: preprocess(read_image_bytes(path)), images):
            pass
    return time.perf_counter() - started


def report(
    options: argparse.Namespace, times: dict[str, list[float]], dtype: torch.dtype, last: EncodingReport
) -> None:
    print(f"{options.size}, {options.images} JPEGs of 640 x 480, batches of {options.batch}, {dtype_name(dtype)}")
    print(f"{torch.get_num_threads()} threads for the encoder, {options.workers} to decode; medians of {options.turns}")
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in times.items():
        each = ", ".join(f"{options.images / one:.2f}" for one in seconds)
        print(f"{name:<16}{options.images / middle[name]:>10.2f} images/s   (each turn: {each})")
    print(f"stage one's last turn: {last.encoding:.2f} s encoding, {last.waiting_for_images:.2f} s waiting for "
          f"images, {last.waiting_for_disk:.2f} s waiting for the disk")  # fmt: skip
    print(f"ratio, stage one to bare: {middle['bare'] / middle['stage one']:.3f}")


if __name__ == "__main__":
    main()
