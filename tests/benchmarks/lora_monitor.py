"""Measure the cost of monitoring LoRA weights at the size of BLIP-2 OPT-2.7b: 32 layers, q and v, 2560 x 2560, 4-bit.

    python tests/benchmarks/lora_monitor.py --ranks 16 64 --step-seconds 25

All layers share one frozen weight, which is dequantized for each. The overhead is the time of a measurement divided by
that of `--lora-monitor-steps` steps. Memory is the peak of a measurement beyond what was allocated before.
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
    """Change every trained weight a little."""
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
    parser.add_argument("--lora-monitor-steps", type=int, default=50)
    options = parser.parse_args()
    device = pick_device()
    print(f"{2 * options.layers} matrices of {options.width}, {device}, {torch.get_num_threads()} threads, "
          f"{os.cpu_count()} processors, {options.rounds} rounds")  # fmt: skip
    for rank in options.ranks:
        model = adapted_model(options.layers, options.width, rank, device)
        with TemporaryDirectory() as name:
            measured, memory = measure_cost(model, Run(Path(name)), options.rounds, device)
        print_table(f"ms, rank {rank}", measured, {})
        seconds = sorted(measured["a measurement"])[options.rounds // 2] / 1e3
        overhead = seconds / options.lora_monitor_steps / options.step_seconds
        print(f"overhead {overhead:.3%}; memory {memory / 1e6:.0f} MB")


def measure_cost(model: PeftModel, run: Run, rounds: int, device: torch.device) -> tuple[dict[str, list[float]], int]:
    monitor = LoraMonitorCallback(model, run, steps=1, warmup_steps=0, stop=StopRequest())
    arguments = TrainingArguments(output_dir=str(run.checkpoints), report_to=[], use_cpu=device.type == "cpu")
    state, control = TrainerState(max_steps=rounds), TrainerControl()
    start = milliseconds(lambda: monitor.on_train_begin(arguments, state, control), device)
    measurements = []
    reset_peak(device)
    before = peak_bytes(device) or 0
    for state.global_step in range(1, rounds + 1):
        step(model)
        measurements.append(milliseconds(lambda: monitor.on_step_end(arguments, state, control), device))
    return {"start, with frozen norms": [start], "a measurement": measurements}, (peak_bytes(device) or 0) - before


if __name__ == "__main__":
    main()
