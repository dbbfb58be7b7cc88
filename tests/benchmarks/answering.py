"""Answers from the cache against plain `generate` on the full model, side by side in one run.

    python tests/benchmarks/answering.py                           # the embedded checkpoint, easy-VQA's questions
    python tests/benchmarks/answering.py --size blip2-opt-2.7b     # real size, random weights: 7.5 GB on disk

Both answer the same questions in batches of the same size, greedily, with as many new tokens; they take turns. The
plain way is transformers and PEFT alone, one question a sequence, its picture decoded already. The cached way is `pipe
evaluate` without the scoring: it reads the features from a cache on disk. Beside each stands what counting gives: its
matrix products at this machine's best speed, and its reads of weights (4-bit ones half a byte each, once a pass) at
the speed at which this machine sums up memory.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from common import digests
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import Blip2Config

from cache.part import PartWriter
from cache.reader import FeatureReader
from cache.spec import CacheSpec
from cache.text import Ragged, TextTable
from cache.writer import FeatureWriter
from pipeline.answers.generation import GeneratedAnswer, answer_questions
from pipeline.batches.sequences import SequenceBuilder
from pipeline.blip2.device import dtype_name, pick_device, pick_dtype
from pipeline.blip2.embedded import embedded_checkpoint
from pipeline.blip2.encoder import Blip2Encoder
from pipeline.blip2.language_model import Blip2LanguageHalf, load_language_half
from pipeline.blip2.random_checkpoint import SIZES, config_of, write_random_checkpoint
from pipeline.commands.benchmark import (
    ALPHA,
    META,
    TARGETS,
    Question,
    R,
    make_questions,
    matrix_product_peak,
    plain_model,
)
from pipeline.config import DataConfig, EvaluateConfig, SplitFiles
from pipeline.data.text import PromptTokenizer
from pipeline.data.vqa import read_examples


def main() -> None:
    options = parse()
    device = pick_device()
    dtype = pick_dtype("auto", device)
    with TemporaryDirectory() as name:
        checkpoint = embedded_checkpoint() if options.size == "tiny" else (options.folder or Path(name)) / options.size
        if not checkpoint.exists():
            write_random_checkpoint(checkpoint, options.size)
        config = config_of(options.size)
        questions = easy_vqa(options.questions) if options.size == "tiny" else make_questions(options.questions, config)
        builder = make_cache(Path(name) / "cache", questions, config)
        ways = {
            "plain": plainly(plain_model(checkpoint, device, dtype).eval(), questions, config, options),
            "cached": from_cache(cached_model(checkpoint, device, dtype).eval(), builder, options),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(options.turns + 1):
            for way, answer in ways.items():
                started = time.perf_counter()
                answer()
                if turn:  # the first warms up
                    seconds[way].append(time.perf_counter() - started)
    floors = count(builder, config, options, matrix_product_peak(device, dtype), read_peak(device))
    report(options, seconds, floors, dtype)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="tiny", help="tiny: the embedded checkpoint")
    parser.add_argument("--questions", type=int, help="default: 1,024, or 32 at real size")
    parser.add_argument("--batch", type=int, help="questions; default: 64, or 32 at real size")
    parser.add_argument("--new-tokens", type=int, default=3)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keeps the random weights there")
    options = parser.parse_args()
    options.questions = options.questions or (1024 if options.size == "tiny" else 32)
    options.batch = options.batch or (64 if options.size == "tiny" else 32)
    return options


def easy_vqa(count: int) -> list[Question]:
    """Questions of its test split, image by image."""
    tokenizer = PromptTokenizer(embedded_checkpoint(), DataConfig(format="easy_vqa", test=SplitFiles()).prompt)
    examples = sorted(read_examples("easy_vqa", "test").examples, key=lambda one: one.image)[:count]
    images = {image: number for number, image in enumerate(dict.fromkeys(one.image for one in examples))}
    prompts = tokenizer.prompts([one.question for one in examples])
    return [Question(images[one.image], prompt, [0]) for one, prompt in zip(examples, prompts, strict=True)]


def make_cache(folder: Path, questions: list[Question], config: Blip2Config) -> SequenceBuilder:
    """Random features and the questions' tokens, as stage one leaves them."""
    spec = CacheSpec(
        encoder_fingerprint="ab" * 32,
        encoder_dtype="float16",
        image_preprocessing="{}",
        query_tokens=config.num_query_tokens,
        width=config.qformer_config.hidden_size,
        dtype="float16",
    )
    images = digests(questions[-1].image + 1)
    rng = np.random.default_rng(0)
    with FeatureWriter(folder, spec, images) as writer:
        for path in writer.parts:
            with PartWriter(path) as part:
                for rows in part.unwritten_batches(64):
                    part.write(
                        np.asarray(rows),
                        rng.normal(size=(len(rows), config.num_query_tokens, spec.width)).astype("<f2"),
                    )
                part.seal()
        row = writer.rows()
        text = TextTable(
            records=Ragged.from_rows([b"{}"] * len(questions), np.uint8),
            image_row=np.array([row[images[one.image]] for one in questions]),
            prompt_ids=Ragged.from_rows([one.prompt for one in questions], np.int32),
            target_ids=Ragged.from_rows([one.target for one in questions], np.int32),
            prompt="",
            tokenizer="",
        )
        writer.finish({"val": text})
    return SequenceBuilder(FeatureReader(folder), text)


def from_cache(
    model: Any, builder: SequenceBuilder, options: argparse.Namespace
) -> Callable[[], dict[int, GeneratedAnswer]]:
    settings = EvaluateConfig(
        batch_size=options.batch,
        num_beams=options.beams,
        max_new_tokens=options.new_tokens,
        min_new_tokens=options.new_tokens,
    )

    class NoWords:
        def decode(self, rows: list[list[int]]) -> list[str]:
            return [""] * len(rows)

    return lambda: answer_questions(model, builder, np.arange(options.questions), NoWords(), settings)


def plainly(
    model: Any, questions: list[Question], config: Blip2Config, options: argparse.Namespace
) -> Callable[[], None]:
    """What a script does: batches by length, padded on the left, pixels and text through `generate`."""
    ordered = sorted(questions, key=lambda one: len(one.prompt))
    weight = next(weight for weight in model.parameters() if weight.is_floating_point() and not weight.requires_grad)
    side = config.vision_config.image_size
    image = [config.image_token_index] * config.num_query_tokens
    batches = []
    for start in range(0, len(ordered), options.batch):
        some = ordered[start : start + options.batch]
        longest = max(len(one.prompt) for one in some)
        input_ids = torch.full((len(some), len(image) + longest), config.text_config.pad_token_id)
        for row, one in enumerate(some):
            input_ids[row, longest - len(one.prompt) :] = torch.tensor([*image, *one.prompt])
        mask = (input_ids != config.text_config.pad_token_id).long()
        pixels = torch.randn(len(some), 3, side, side, dtype=weight.dtype)
        batches.append({"pixel_values": pixels, "input_ids": input_ids, "attention_mask": mask})

    def answer() -> None:
        for batch in batches:
            model.generate(
                **{name: tensor.to(weight.device) for name, tensor in batch.items()},
                num_beams=options.beams,
                max_new_tokens=options.new_tokens,
                min_new_tokens=options.new_tokens,
                do_sample=False,
            )

    return answer


def cached_model(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """As `pipe evaluate` has it, with an adapter that is not trained."""
    return get_peft_model(
        load_language_half(folder, device, dtype), LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(TARGETS))
    )


def read_peak(device: torch.device, gigabytes: float = 1.0) -> float:
    """Bytes a second of a sum over a large tensor, the best of some."""
    tensor = torch.zeros(int(gigabytes * 2**28), device=device)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        tensor.sum().item()
        best = min(best, time.perf_counter() - started)
    return tensor.nbytes / best


def count(
    builder: SequenceBuilder, config: Blip2Config, options: argparse.Namespace, products: float, reads: float
) -> dict[str, tuple[float, float]]:
    """Seconds a question by matrix products and by reads of weights, for each way; the attention is left out."""
    batch = list(range(min(options.batch, options.questions)))
    with META:
        half, encoder = Blip2LanguageHalf(config), Blip2Encoder(config)
        pixels = torch.empty(1, 3, config.vision_config.image_size, config.vision_config.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        embeds = encoder.vision_model(pixels).last_hidden_state
        encoder.qformer(query_embeds=encoder.query_tokens, encoder_hidden_states=embeds)
    encoding = counter.get_total_flops()
    encoder_bytes = 2 * sum(weight.numel() for weight in encoder.parameters())
    weights = sum(weight.numel() for name, weight in half.named_parameters() if ".layers." in name)
    head = half.get_output_embeddings().weight.numel()
    width, new = len(batch) * options.beams, options.new_tokens
    later = 2 * width * (new - 1) * (weights + head)  # each new token but the first goes once through the model
    longest = max(len(builder.text.prompt_ids[number]) for number in batch) + config.num_query_tokens
    nodes = sum(sequence.num_tokens for sequence in builder.for_generation(batch))
    operations = {
        "plain": len(batch) * (encoding + 2 * weights * longest + 2 * head) + later,
        "cached": 2 * weights * (nodes + width) + 2 * width * head + later,
    }
    a_pass = weights / 2 + 2 * head
    moved = {"plain": encoder_bytes + new * a_pass, "cached": weights / 2 + new * a_pass}
    return {way: (operations[way] / len(batch) / products, moved[way] / len(batch) / reads) for way in operations}


def report(
    options: argparse.Namespace,
    seconds: dict[str, list[float]],
    floors: dict[str, tuple[float, float]],
    dtype: torch.dtype,
) -> None:
    rates = {way: options.questions / median(times) for way, times in seconds.items()}
    print(f"{options.size}, {dtype_name(dtype)}, {options.questions} questions, {options.batch} at a time, ", end="")
    print(f"{options.beams} beams, {options.new_tokens} new tokens each")
    for way, rate in rates.items():
        times = " ".join(f"{one:.2f}" for one in seconds[way])
        products, reads = floors[way]
        print(f"{way:>8}: {rate:8.3g} questions/s (turns of {times} s); ", end="")
        print(f"products alone {1 / products:.3g}, reads alone {1 / reads:.3g}, one after the other "
              f"{1 / (products + reads):.3g}")  # fmt: skip
    counted = sum(floors["plain"]) / sum(floors["cached"])
    print(f"ratio: {rates['cached'] / rates['plain']:.2f}; by counting: {counted:.2f}")


if __name__ == "__main__":
    main()
