"""What the pipeline brings on this machine: the plain recipe, one question a sequence, and token trees, side by side.

Models of real size with random weights, nothing to be downloaded. Each way trains in a process of its own, and they
take turns. A step is forward, backward and AdamW over the same questions, in one pass, for all ways.

The questions are made up to VQAv2's averages: 5.4 an image (3 and a Poisson number), 7.2 tokens a question, 2.4 a
target. Their words are random, so that the trees share the image and the prompt's first words, and nothing else. The
plain recipe gets pixels already decoded, in the compute dtype, and its encoder runs on each question's picture, as it
does in transformers' training examples; its logits are computed as transformers computes them, at every position.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BitsAndBytesConfig, Blip2Config, Blip2ForConditionalGeneration

from pipeline.batches.sequences import ImageSequence, pack
from pipeline.blip2.device import dtype_name, pick_device, pick_dtype
from pipeline.blip2.encoder import Blip2Encoder
from pipeline.blip2.language_model import Blip2LanguageHalf, add_lora, load_language_half
from pipeline.blip2.memory import peak_bytes, reset_peak
from pipeline.blip2.prefix_tree import PromptTarget, build_prefix_tree
from pipeline.blip2.random_checkpoint import config_of, write_random_checkpoint
from pipeline.common.errors import PipelineError
from pipeline.common.files import write_text
from pipeline.common.progress import log_info, progress_bar

VQAV2_QUESTIONS = 443_757  # of its train split: an epoch
R, ALPHA, DROPOUT, TARGETS = 16, 32, 0.05, ("q_proj", "v_proj")
IGNORED = -100
META = torch.device("meta")
BEFORE, BEHIND = (2, 45641, 35), (31652, 35)
"""BOS and "Question:"; " Answer:". What is behind the question cannot be shared."""


@dataclass(frozen=True)
class Question:
    """Token ids."""

    image: int
    prompt: list[int]
    target: list[int]


def make_questions(count: int, config: Blip2Config, seed: int = 0) -> list[Question]:
    """`count` questions, image by image."""
    rng = np.random.default_rng(seed)
    vocabulary = config.text_config.vocab_size
    before, behind = ([token % vocabulary for token in tokens] for tokens in (BEFORE, BEHIND))
    questions: list[Question] = []
    for image in range(count):
        for _ in range(min(3 + rng.poisson(2.36), count - len(questions))):
            words = rng.integers(3, vocabulary - 1, 3 + rng.poisson(4.2)).tolist()
            target = rng.integers(3, vocabulary - 1, 1 + rng.poisson(0.4)).tolist()
            prompt = [*before, *words, *behind]
            questions.append(Question(image, prompt, [*target, config.text_config.eos_token_id % vocabulary]))
    return questions


def sequences_of(questions: list[Question], config: Blip2Config, share: bool) -> list[ImageSequence]:
    """The questions as stage two lays them out, with random features."""
    generator = torch.Generator().manual_seed(0)
    shape = config.num_query_tokens, config.qformer_config.hidden_size
    groups: dict[int, list[Question]] = {}
    for number, question in enumerate(questions):
        groups.setdefault(question.image if share else number, []).append(question)
    return [
        ImageSequence(
            torch.randn(shape, generator=generator).half(),
            build_prefix_tree(shape[0], [PromptTarget(one.prompt, one.target) for one in group]),
            len(group),
        )
        for group in groups.values()
    ]


def plain_inputs(questions: list[Question], config: Blip2Config, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the recipe's processor and collator give: the pixels, image tokens and text of each question, padded."""
    side = config.vision_config.image_size
    texts = [[*[config.image_token_index] * config.num_query_tokens, *one.prompt, *one.target] for one in questions]
    longest = max(map(len, texts))
    input_ids = torch.full((len(texts), longest), config.text_config.pad_token_id)
    labels = torch.full_like(input_ids, IGNORED)
    attention_mask = torch.zeros_like(input_ids)
    for row, (text, question) in enumerate(zip(texts, questions, strict=True)):
        input_ids[row, : len(text)] = torch.tensor(text)
        labels[row, len(text) - len(question.target) : len(text)] = torch.tensor(question.target)
        attention_mask[row, : len(text)] = 1
    pixel_values = torch.randn(len(texts), 3, side, side, dtype=dtype)
    return {
        "pixel_values": pixel_values, "input_ids": input_ids, "labels": labels, "attention_mask": attention_mask
    }  # fmt: skip


def plain_model(folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The recipe's model: all of BLIP-2, its language model in 4 bits."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["vision_model", "qformer", "language_projection", "lm_head"],
    )
    model = Blip2ForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, device_map={"": device}, quantization_config=quantization
    )
    lora = LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=list(TARGETS))
    return get_peft_model(model, lora)


def stage_two_model(folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    return add_lora(load_language_half(folder, device, dtype), R, ALPHA, DROPOUT, TARGETS, "none")


WAYS: dict[str, tuple[Callable[..., nn.Module], Callable[..., dict[str, Any]]]] = {
    "plain": (plain_model, plain_inputs),
    "unshared": (stage_two_model, lambda questions, config, _: pack(sequences_of(questions, config, share=False))),
    "shared": (stage_two_model, lambda questions, config, _: pack(sequences_of(questions, config, share=True))),
}


def benchmark(size: str, questions: int, turns: int, folder: Path | None = None) -> dict[str, Any]:
    """Trains `turns` steps of `questions` questions each way, after one to warm up; the summary of all.

    `folder` holds the checkpoint of random weights, or is where it is to be made; by default it is made for the time
    of the run. Raises `PipelineError`.
    """
    started = time.perf_counter()
    device = pick_device()
    dtype = pick_dtype("auto", device)
    with TemporaryDirectory(prefix="blip2-random-") as temporary:
        checkpoint = (folder or Path(temporary)) / size
        if not checkpoint.exists():
            write_random_checkpoint(checkpoint, size)
        seconds, peaks = _take_turns(checkpoint, questions, turns)
    config = config_of(size)
    operations = count_operations(make_questions(questions, config), config)
    peak = matrix_product_peak(device, dtype)
    rate = {way: questions / median(times) for way, times in seconds.items()}
    return {
        "size": size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": dtype_name(dtype),
        "questions": questions,
        "ratios": {f"shared_vs_{way}": rate["shared"] / rate[way] for way in ("plain", "unshared")},
        "ratios_by_operations": {
            f"shared_vs_{way}": operations[way] / operations["shared"] for way in ("plain", "unshared")
        },
        "questions_per_second": rate,
        "seconds_per_step": seconds,
        "peak_memory_bytes": peaks,
        "teraflop_per_question": {way: count / questions / 1e12 for way, count in operations.items()},
        "matrix_product_peak_teraflops": peak / 1e12,
        "share_of_peak": {way: rate[way] * count / questions / peak for way, count in operations.items()},
        "hours_for_vqav2_epoch": {way: VQAV2_QUESTIONS / one / 3600 for way, one in rate.items()},
        "seconds": time.perf_counter() - started,
    }


def count_operations(questions: list[Question], config: Blip2Config) -> dict[str, int]:
    """Floating-point operations of a step's matrix products, counted by torch on tensors without storage."""
    with META:
        half = Blip2LanguageHalf(config).requires_grad_(False)
        model = add_lora(half, R, ALPHA, DROPOUT, TARGETS, "none")
        encoder = Blip2Encoder(config)
        pixel_values = torch.empty(1, 3, config.vision_config.image_size, config.vision_config.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        image_embeds = encoder.vision_model(pixel_values).last_hidden_state
        encoder.qformer(query_embeds=encoder.query_tokens, encoder_hidden_states=image_embeds)
    encoding = counter.get_total_flops() * len(questions)
    counted = {}
    for way in ("unshared", "shared"):
        with FlopCounterMode(display=False) as counter:
            model(**_to(pack(sequences_of(questions, config, way == "shared")), META)).loss.backward()
        counted[way] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        model(**_to(_padded_chains(questions, config), META)).loss.backward()
    return {"plain": encoding + counter.get_total_flops(), **counted}


def matrix_product_peak(device: torch.device, dtype: torch.dtype, side: int = 4096) -> float:
    """Operations a second of a large product, the best of some."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        _wait(device)
        started = time.perf_counter()
        torch.matmul(left, right)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def draw(summary: dict[str, Any], path: Path) -> None:
    """Questions a second by way, as bars in an SVG file. Raises OSError."""
    rates: dict[str, float] = summary["questions_per_second"]
    bars = []
    for row, (way, rate) in enumerate(rates.items()):
        top, width = 40 + 30 * row, 360 * rate / max(rates.values())
        bars.append(f'<text x="10" y="{top + 15}">{way}</text><rect x="90" y="{top}" width="{width:.1f}" height="20"/>')
        bars.append(f'<text x="{95 + width:.1f}" y="{top + 15}">{rate:.3g}</text>')
    title = f"questions a second, {summary['size']}, {summary['device']}, {summary['dtype']}"
    write_text(
        path,
        f'<svg xmlns="http://www.w3.org/2000/svg" width="540" height="{50 + 30 * len(rates)}" '
        'font-family="sans-serif" font-size="14" style="background:#fff"><style>rect{fill:#4269d0}</style>'
        f'<text x="10" y="22">{title}</text>{"".join(bars)}</svg>\n',
    )


def _padded_chains(questions: list[Question], config: Blip2Config) -> dict[str, Any]:
    """What the plain recipe's language model computes: one question a sequence, padded, logits at every position."""
    longest = max(len(one.prompt) + len(one.target) for one in questions)
    padded = [Question(one.image, one.prompt, [0] * (longest + 1 - len(one.prompt))) for one in questions]
    inputs = pack(sequences_of(padded, config, share=False))
    nodes = len(inputs["position_ids"])
    everywhere = {"label_indices": torch.arange(nodes), "labels": torch.zeros(nodes, dtype=torch.long)}
    return inputs | everywhere | {"label_weights": torch.ones(nodes)}


def _take_turns(checkpoint: Path, questions: int, turns: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each step, and the highest peak of memory, by way."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks = dict.fromkeys(WAYS, 0)
    with _workers(checkpoint, questions) as workers, progress_bar("benchmark", 3 * (turns + 1), "steps") as bar:
        for turn in range(turns + 1):
            for way, worker in workers.items():
                worker.send("step")
                taken, peak = _answer(way, worker)
                bar.update()
                if turn:
                    seconds[way].append(taken)
                    peaks[way] = max(peaks[way], peak)
    return seconds, peaks


@contextmanager
def _workers(checkpoint: Path, questions: int) -> Iterator[dict[str, Connection]]:
    """A process for each way, its model loaded."""
    context = multiprocessing.get_context("spawn")
    ends, processes = {}, []
    try:
        for way in WAYS:
            log_info(f"loading the model: {way}")
            ends[way], theirs = context.Pipe()
            processes.append(context.Process(target=_work, args=(way, checkpoint, questions, theirs), daemon=True))
            processes[-1].start()
            theirs.close()
            _answer(way, ends[way])
        yield ends
    finally:
        for process in processes:
            process.kill()


def _answer(way: str, worker: Connection) -> Any:
    try:
        answer = worker.recv()
    except EOFError:
        raise PipelineError(f"the process that measures {way!r} died, of too little memory perhaps") from None
    if isinstance(answer, str):
        raise PipelineError(f"{way}: {answer}; try fewer --questions")
    return answer


def _work(way: str, checkpoint: Path, questions: int, connection: Connection) -> None:
    """In a process of its own: loads, then a step for every word that comes in."""
    try:
        step = _step(way, checkpoint, questions)
        connection.send(None)
        while connection.recv():
            connection.send(step())
    except (RuntimeError, ValueError, OSError) as error:
        connection.send((str(error).strip() or repr(error)).splitlines()[0])


def _step(way: str, checkpoint: Path, questions: int) -> Callable[[], tuple[float, int]]:
    """A training step; -> its seconds, and the most memory that was taken."""
    torch.manual_seed(0)
    device = pick_device()
    dtype = pick_dtype("auto", device)
    load, inputs_of = WAYS[way]
    model = load(checkpoint, device, dtype).train()
    config = Blip2Config.from_pretrained(checkpoint)
    inputs = inputs_of(make_questions(questions, config), config, dtype)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)

    def step() -> tuple[float, int]:
        reset_peak(device)
        started = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(**_to(inputs, device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait(device)
        return time.perf_counter() - started, peak_bytes(device)

    return step


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _to(one, device) for name, one in value.items()}
    if isinstance(value, list):
        return [_to(one, device) for one in value]
    return value.to(device) if isinstance(value, Tensor) else value


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
