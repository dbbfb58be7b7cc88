"""A run's adapter, or a full model with it folded in, as a folder of its own, and on the hub."""

import gc
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedModel

from cache.files import fsync_folder
from cache.spec import CacheError
from pipeline.answers.generation import answer_questions
from pipeline.batches.sequences import SequenceBuilder, pack
from pipeline.batches.split import load_tokenizer, open_split
from pipeline.blip2.base_model import load_base
from pipeline.blip2.checkpoint import ENCODER_PREFIXES, LANGUAGE_MODEL_PREFIXES, fetch_checkpoint
from pipeline.blip2.device import pick_device, pick_dtype
from pipeline.blip2.language_model import TREE_INPUTS, copy_permissions, load_adapter
from pipeline.blip2.memory import free_memory_bytes, give_back_memory, is_out_of_memory
from pipeline.blip2.merge import merged_bytes, write_merged
from pipeline.common.compat import keep_weights_trainable
from pipeline.common.errors import PipelineError
from pipeline.common.files import followed_by, require_utf8, require_writable, sync_files, write_text, writing
from pipeline.common.hub import check_repo_name, push
from pipeline.common.progress import log_info
from pipeline.config import Config, ModelConfig
from pipeline.encoding.disk_space import format_bytes, free_disk_bytes
from pipeline.runs.card import model_card
from pipeline.runs.run import Run

COMPARED = 100  # questions, at most
SMALL_FILES_BYTES = 16 << 20
"""More than config, tokenizer and image processor have."""


def export(
    run: Run,
    destination: Path,
    overrides: tuple[str, ...] = (),
    merge: bool = False,
    repo: str | None = None,
) -> dict[str, Any]:
    """Write the run's adapter, or with `merge` the full model, to the new folder `destination`; and push it to `repo`.

    `destination` appears when it is whole. Raises `PipelineError`; if it is of the push, the folder is there.
    """
    started = time.perf_counter()
    config = run.trained_config(overrides)
    if repo:
        check_repo_name(repo)
    summary = {"run": str(run.path), "destination": str(destination), "merged": merge}
    with _appearing(destination) as folder:
        if merge:
            _merge(run, config, folder)
        else:
            _copy_files(run.adapter, folder)
        write_text(folder / "README.md", model_card(run, config, merge))
        copy_permissions(folder / "README.md", folder)
    summary["bytes"] = sum(path.stat().st_size for path in destination.rglob("*"))
    if merge:
        summary["differences"] = differences(run, config, destination)
    if repo:
        summary["url"] = push(destination, repo)
    return {**summary, "seconds": time.perf_counter() - started}


@contextmanager
def _appearing(destination: Path) -> Iterator[Path]:
    """A folder that gets the name `destination` at the end, and goes if anything fails."""
    if os.path.lexists(destination):
        raise PipelineError(f"{destination}: exists already; name another folder, or move it away")
    require_utf8(destination)
    partial = destination.with_name(destination.name + ".partial")
    if os.path.lexists(partial):
        raise PipelineError(
            f"{partial}: left by an export that was killed, or one that is at work; delete it, and export again"
        )
    with followed_by("run the same command again; or export to another folder"):
        require_writable(partial)
        with writing(destination):
            destination.parent.mkdir(parents=True, exist_ok=True)
            try:
                partial.mkdir()
                yield partial
                sync_files(partial)
                partial.rename(destination)
                fsync_folder(destination.parent)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise


def _copy_files(source: Path, folder: Path) -> None:
    """Without their permissions: the copies of read-only files are written to."""
    for path in source.rglob("*"):
        if path.is_file():
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _merge(run: Run, config: Config, folder: Path) -> None:
    model = config.model
    checkpoint = fetch_checkpoint(model.checkpoint, model.revision, (*ENCODER_PREFIXES, *LANGUAGE_MODEL_PREFIXES))
    needed, free = merged_bytes(checkpoint) + SMALL_FILES_BYTES, free_disk_bytes(folder)
    if needed > free:
        raise PipelineError(
            f"{folder.parent}: the merged model takes {format_bytes(needed)}, and {format_bytes(free)} are free. "
            "Make room, or export "
            "to another disk"
        )
    write_merged(checkpoint, load_adapter(load_base(config), run.adapter), folder)


class _Said(NamedTuple):
    answers: list[str]
    logits: Tensor
    """(L, vocabulary), where the tokens of the run's own answers are expected."""


def differences(run: Run, config: Config, merged: Path) -> dict[str, float] | None:
    """How far the merged model is from the run, on cached questions of `evaluate.split`; None if there is no cache, or
    too little memory.

    Both compute in the run's dtype: what is left is what merging changes, float16 weights and their rounding. The
    logits are compared at the tokens of the run's answers; equal answers are told in percent.
    """
    try:
        _check_memory(config, merged)
        builder = open_split(config, config.evaluate.split, trained=False, answered=True)
    except (CacheError, PipelineError) as error:
        log_info(f"the merged model is not compared with the run: {error}")
        return None
    questions = np.unique(np.linspace(0, len(builder.text) - 1, min(COMPARED, len(builder.text)), dtype=np.int64))
    plain = config.model_copy(
        update={
            "model": ModelConfig(checkpoint=str(merged)),
            "quantization": config.quantization.model_copy(update={"bits": None}),
        }
    )
    try:
        ours = _say_all(config, run.adapter, builder, questions)
        gc.collect()
        give_back_memory()
        theirs = _say_all(plain, None, builder, questions, ours.answers)
    except (RuntimeError, MemoryError, PipelineError) as error:
        if not isinstance(error, PipelineError) and not is_out_of_memory(error):
            raise
        what = error if isinstance(error, PipelineError) else "out of memory; try a smaller evaluate.batch_size"
        log_info(f"the merged model is not compared with the run: {what}")
        return None
    apart = (ours.logits - theirs.logits).abs()
    return {
        "questions": len(questions),
        "equal_answers": 100 * float(np.mean([a == b for a, b in zip(ours.answers, theirs.answers, strict=True)])),
        "largest_of_logits": float(apart.max()),
        "mean_of_logits": float(apart.mean()),
    }


def _check_memory(config: Config, merged: Path) -> None:
    device = pick_device()
    itemsize = pick_dtype(config.quantization.compute_dtype, device).itemsize
    needed, free = merged_bytes(merged) * itemsize // 2, free_memory_bytes(device)
    if needed > free:
        raise PipelineError(f"that takes {format_bytes(needed)} of memory, and {format_bytes(free)} are free")


def _say_all(
    config: Config,
    adapter: Path | None,
    builder: SequenceBuilder,
    questions: np.ndarray,
    wanted: list[str] | None = None,
) -> _Said:
    """A model's answers, and its logits along the answers `wanted`, by default its own."""
    tokenizer = load_tokenizer(config)
    model: PreTrainedModel = load_base(config)
    if adapter:
        model = load_adapter(model, adapter)
        keep_weights_trainable(model)
    found = answer_questions(model, builder, questions, tokenizer, config.evaluate)
    answers = [found[number].text for number in questions.tolist()]
    targets = dict(zip(questions.tolist(), tokenizer.targets(wanted or answers), strict=True))
    logits = []
    for start in range(0, len(questions), config.evaluate.batch_size):
        some = questions[start : start + config.evaluate.batch_size]
        inputs = pack(builder.for_training(some, targets=lambda number: [(np.array(targets[number]), 1.0)]))
        asked = {name: inputs[name] for name in (*TREE_INPUTS, "label_indices")}
        with torch.inference_mode():
            logits.append(model.logits(**send_to_device(asked, next(model.parameters()).device)).cpu())
    return _Said(answers, torch.cat(logits))
