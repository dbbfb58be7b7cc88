"""Benchmarks training on this machine: the plain recipe, and this pipeline without and with shared prefixes.

The models have real sizes and random weights, so that nothing is downloaded. Each method trains in a process of its
own, and the processes alternate. A step is forward, backward and AdamW over the same questions, in one pass.

The questions follow the averages of VQAv2: 5.4 questions per image (3 plus a Poisson variable), 7.2 tokens per question
and 2.4 per target. Their tokens are random, so that the prefix trees share the image and the first words of the prompt
only. The plain recipe gets decoded pixels in the compute dtype. Its encoder runs on the image of each question, and its
logits are computed at every position, as in transformers' training examples.
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

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BitsAndBytesConfig, Blip2Config, Blip2ForConditionalGeneration

from pipeline.batches.random_questions import Question, make_questions, sequences_of
from pipeline.batches.sequences import pack
from pipeline.blip2.device import dtype_name, pick_device, pick_dtype
from pipeline.blip2.encoder import Blip2Encoder
from pipeline.blip2.language_model import Blip2LanguageHalf, add_lora, load_language_half
from pipeline.blip2.memory import peak_bytes, reset_peak
from pipeline.blip2.random_checkpoint import config_of, write_random_checkpoint
from pipeline.common.errors import PipelineError
from pipeline.common.files import write_text
from pipeline.common.progress import log_info, progress_bar
from pipeline.common.result import Result

VQAV2_QUESTIONS = 443_757
"""Questions in the training split of VQAv2."""
R, ALPHA, DROPOUT, TARGETS = 16, 32, 0.05, ("q_proj", "v_proj")
IGNORED = -100
META = torch.device("meta")


def plain_inputs(questions: list[Question], config: Blip2Config, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the padded inputs of the plain recipe, as a processor and a collator produce them."""
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
    """Load the model of the plain recipe: the full BLIP-2, its language model in 4 bits."""
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
    """Load the language half with an adapter."""
    return add_lora(load_language_half(folder, device, dtype), R, ALPHA, DROPOUT, TARGETS, "none")


METHODS: dict[str, tuple[Callable[..., nn.Module], Callable[..., dict[str, Any]]]] = {
    "plain": (plain_model, plain_inputs),
    "unshared": (stage_two_model, lambda questions, config, _: pack(sequences_of(questions, config, share=False))),
    "shared": (stage_two_model, lambda questions, config, _: pack(sequences_of(questions, config, share=True))),
}


@dataclass(frozen=True)
class BenchmarkResult(Result):
    """Result of `benchmark`. The methods are `plain`, `unshared` and `shared`."""

    size: str
    device: str
    dtype: str
    questions: int
    """Questions per step."""
    ratios: dict[str, float]
    """Measured speed-up, `shared_vs_plain` and `shared_vs_unshared`."""
    ratios_by_operations: dict[str, float]
    """Speed-up by the number of operations."""
    questions_per_second: dict[str, float]
    """By method."""
    seconds_per_step: dict[str, list[float]]
    peak_memory_bytes: dict[str, int]
    teraflop_per_question: dict[str, float]
    matrix_product_peak_teraflops: float
    """Measured peak of this device, in teraflop per second."""
    share_of_peak: dict[str, float]
    """Operations per second of each method, relative to the peak."""
    hours_for_vqav2_epoch: dict[str, float]
    seconds: float


def benchmark(size: str, questions: int, turns: int, folder: Path | None = None) -> BenchmarkResult:
    """Measure training steps with each method.

    Args:
        size: a key of `pipeline.blip2.random_checkpoint.SIZES`.
        questions: questions per step.
        turns: measured steps of each method, after a warm-up step.
        folder: folder of the checkpoint with random weights, written if it is missing; by default a temporary folder.

    Raises:
        PipelineError: a method fails, for example for lack of memory.
    """
    started = time.perf_counter()
    device = pick_device()
    dtype = pick_dtype("auto", device)
    with TemporaryDirectory(prefix="blip2-random-") as temporary:
        checkpoint = (folder or Path(temporary)) / size
        if not checkpoint.exists():
            write_random_checkpoint(checkpoint, size)
        seconds, peaks = _measure_steps(checkpoint, questions, turns)
    config = config_of(size)
    operations = count_operations(make_questions(questions, config), config)
    peak = matrix_product_peak(device, dtype)
    rates = {method: questions / median(times) for method, times in seconds.items()}
    others = ("plain", "unshared")
    return BenchmarkResult(
        size=size,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        dtype=dtype_name(dtype),
        questions=questions,
        ratios={f"shared_vs_{other}": rates["shared"] / rates[other] for other in others},
        ratios_by_operations={f"shared_vs_{other}": operations[other] / operations["shared"] for other in others},
        questions_per_second=rates,
        seconds_per_step=seconds,
        peak_memory_bytes=peaks,
        teraflop_per_question={method: count / questions / 1e12 for method, count in operations.items()},
        matrix_product_peak_teraflops=peak / 1e12,
        share_of_peak={method: rates[method] * count / questions / peak for method, count in operations.items()},
        hours_for_vqav2_epoch={method: VQAV2_QUESTIONS / rate / 3600 for method, rate in rates.items()},
        seconds=time.perf_counter() - started,
    )


def count_operations(questions: list[Question], config: Blip2Config) -> dict[str, int]:
    """Count the floating-point operations of the matrix products of a step, on tensors without storage."""
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
    for method in ("unshared", "shared"):
        with FlopCounterMode(display=False) as counter:
            model(**_to(pack(sequences_of(questions, config, method == "shared")), META)).loss.backward()
        counted[method] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        model(**_to(_padded_sequences(questions, config), META)).loss.backward()
    return {"plain": encoding + counter.get_total_flops(), **counted}


def matrix_product_peak(device: torch.device, dtype: torch.dtype, side: int = 4096) -> float:
    """Return the operations per second of a large matrix product, the best of five."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        _wait(device)
        started = time.perf_counter()
        torch.matmul(left, right)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def draw(result: BenchmarkResult, path: Path) -> None:
    """Write a bar chart of the questions per second of each method to an SVG file."""
    rates = result.questions_per_second
    bars = []
    for row, (method, rate) in enumerate(rates.items()):
        top, width = 40 + 30 * row, 360 * rate / max(rates.values())
        bars.append(
            f'<text x="10" y="{top + 15}">{method}</text><rect x="90" y="{top}" width="{width:.1f}" height="20"/>'
        )
        bars.append(f'<text x="{95 + width:.1f}" y="{top + 15}">{rate:.3g}</text>')
    title = f"questions per second, {result.size}, {result.device}, {result.dtype}"
    write_text(
        path,
        f'<svg xmlns="http://www.w3.org/2000/svg" width="540" height="{50 + 30 * len(rates)}" '
        'font-family="sans-serif" font-size="14" style="background:#fff"><style>rect{fill:#4269d0}</style>'
        f'<text x="10" y="22">{title}</text>{"".join(bars)}</svg>\n',
    )


def _padded_sequences(questions: list[Question], config: Blip2Config) -> dict[str, Any]:
    """Return what the language model of the plain recipe computes: padded sequences, with logits at every position."""
    longest = max(len(one.prompt) + len(one.target) for one in questions)
    padded = [Question(one.image, one.prompt, [0] * (longest + 1 - len(one.prompt))) for one in questions]
    inputs = pack(sequences_of(padded, config, share=False))
    num_tokens = len(inputs["position_ids"])
    everywhere = {"label_indices": torch.arange(num_tokens), "labels": torch.zeros(num_tokens, dtype=torch.long)}
    return inputs | everywhere | {"label_weights": torch.ones(num_tokens)}


def _measure_steps(checkpoint: Path, questions: int, turns: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return the seconds of each step and the peak memory, by method."""
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    peaks = dict.fromkeys(METHODS, 0)
    with _workers(checkpoint, questions) as workers, progress_bar("benchmark", 3 * (turns + 1), "steps") as bar:
        for turn in range(turns + 1):
            for method, worker in workers.items():
                worker.send("step")
                step_seconds, peak = _receive(method, worker)
                bar.update()
                if turn:
                    seconds[method].append(step_seconds)
                    peaks[method] = max(peaks[method], peak)
    return seconds, peaks


@contextmanager
def _workers(checkpoint: Path, questions: int) -> Iterator[dict[str, Connection]]:
    """Start a process for each method and load its model."""
    context = multiprocessing.get_context("spawn")
    connections, processes = {}, []
    try:
        for method in METHODS:
            log_info(f"loading the model: {method}")
            connections[method], theirs = context.Pipe()
            processes.append(context.Process(target=_work, args=(method, checkpoint, questions, theirs), daemon=True))
            processes[-1].start()
            theirs.close()
            _receive(method, connections[method])
        yield connections
    finally:
        for process in processes:
            process.kill()


def _receive(method: str, worker: Connection) -> Any:
    try:
        message = worker.recv()
    except EOFError:
        raise PipelineError(f"the process of the method {method!r} died, possibly for lack of memory") from None
    if isinstance(message, str):
        raise PipelineError(f"{method}: {message}; try fewer --questions")
    return message


def _work(method: str, checkpoint: Path, questions: int, connection: Connection) -> None:
    """Run the process of a method: load the model, then run a step for each message."""
    try:
        step = _step(method, checkpoint, questions)
        connection.send(None)
        while connection.recv():
            connection.send(step())
    except (RuntimeError, ValueError, OSError) as error:
        connection.send((str(error).strip() or repr(error)).splitlines()[0])


def _step(method: str, checkpoint: Path, questions: int) -> Callable[[], tuple[float, int]]:
    """Return a function that runs a training step and returns its seconds and its peak memory."""
    torch.manual_seed(0)
    device = pick_device()
    dtype = pick_dtype("auto", device)
    load, make_inputs = METHODS[method]
    model = load(checkpoint, device, dtype).train()
    config = Blip2Config.from_pretrained(checkpoint)
    inputs = make_inputs(make_questions(questions, config), config, dtype)
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
        return {name: _to(item, device) for name, item in value.items()}
    if isinstance(value, list):
        return [_to(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
