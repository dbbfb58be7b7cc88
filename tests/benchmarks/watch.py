"""What a look at the LoRA weights costs at the size of BLIP-2 OPT-2.7b: 32 layers, q and v, 2560 x 2560 in 4 bits.

    python tests/benchmarks/watch.py --ranks 16 64 --step-seconds 25

All layers share one frozen weight, which is unpacked for each as if it were its own. The share is that of a look in the
time of `--watch-steps` steps. Memory is the most that a look takes beyond what lies there before.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from bitsandbytes.nn import Linear4bit
from common import print_table
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from pipeline.blip2.device import pick_device
from pipeline.blip2.memory import peak_bytes, reset_peak
from pipeline.runs.run import Run
from pipeline.training.lora_monitor import LoraMonitorCallback
from pipeline.training.stopping import StopRequest


def adapted_model(layers: int, width: int, rank: int, device: torch.device) -> PeftModel:
    frozen = Linear4bit(width, width, compute_dtype=torch.bfloat16, quant_type="nf4").to(device).requires_grad_(False)
    model = nn.Module()
    model.layers = nn.ModuleList()
    for _ in range(layers):
        layer = nn.ModuleDict({name: Linear4bit(1, 1, quant_type="nf4") for name in ("q_proj", "v_proj")})
        for linear in layer.values():
            linear.in_features = linear.out_features = width
            linear.weight = frozen.weight
        model.layers.append(layer)
    return get_peft_model(model, LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]))


def step(model: PeftModel) -> None:
    """Every trained weight a little elsewhere."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 1e-4 * torch.randn_like(weight)


def milliseconds(work: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=2560)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-seconds", type=float, default=25.0)
    parser.add_argument("--watch-steps", type=int, default=50)
    options = parser.parse_args()
    device = pick_device()
    print(f"{2 * options.layers} matrices of {options.width}, {device}, {torch.get_num_threads()} threads, "
          f"{os.cpu_count()} processors, {options.rounds} rounds")  # fmt: skip
    for rank in options.ranks:
        model = adapted_model(options.layers, options.width, rank, device)
        with TemporaryDirectory() as name:
            measured, memory = look(model, Run(Path(name)), options.rounds, device)
        print_table(f"ms, rank {rank}", measured, {})
        share = (
            sorted(measured["a look"])[options.rounds // 2] / 1e3 / options.lora_monitor_steps / options.step_seconds
        )
        print(f"share of the training time {share:.3%}; memory {memory / 1e6:.0f} MB")


def look(model: PeftModel, run: Run, rounds: int, device: torch.device) -> tuple[dict[str, list[float]], int]:
    watch = LoraMonitorCallback(model, run, steps=1, warmup_steps=0, stop=StopRequest())
    arguments = TrainingArguments(output_dir=str(run.checkpoints), report_to=[], use_cpu=device.type == "cpu")
    state, control = TrainerState(max_steps=rounds), TrainerControl()
    start = milliseconds(lambda: watch.on_train_begin(arguments, state, control), device)
    looks = []
    reset_peak(device)
    before = peak_bytes(device) or 0
    for state.global_step in range(1, rounds + 1):
        step(model)
        looks.append(milliseconds(lambda: watch.on_step_end(arguments, state, control), device))
    return {"the start, with frozen norms": [start], "a look": looks}, (peak_bytes(device) or 0) - before


if __name__ == "__main__":
    main()
