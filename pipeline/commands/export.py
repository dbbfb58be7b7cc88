"""Export a run's adapter, or the full model with the adapter merged, to a folder and to the Hugging Face hub."""

import gc
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
from pipeline.common import hub
from pipeline.common.compat import keep_weights_trainable
from pipeline.common.errors import PipelineError
from pipeline.common.files import followed_by, require_utf8, require_writable, sync_files, write_text, writing
from pipeline.common.progress import log_warning
from pipeline.common.result import Result
from pipeline.config import Config, ModelConfig
from pipeline.encoding.disk_space import format_bytes, free_disk_bytes
from pipeline.runs.card import model_card
from pipeline.runs.run import Run, RunLike

MAX_COMPARED = 100
"""Questions on which a merged model is compared with the run."""
SMALL_FILES_BYTES = 16 << 20
"""Upper bound for config, tokenizer and image processor."""


@dataclass(frozen=True)
class ExportResult(Result):
    """The summary of an export."""

    run: str
    destination: str
    merged: bool
    bytes: int
    """Size of all files."""
    differences: dict[str, float] | None
    """Between the merged model and the run, see `compare_merged`; None if they were not compared."""
    url: str | None
    """The repository on the hub; None without a push."""
    seconds: float


def export(
    run: RunLike,
    destination: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    merge: bool = False,
    push: str | None = None,
) -> ExportResult:
    """Export a run's adapter, or with `merge` the full model, to a new folder.

    The folder appears only when it is complete.

    Args:
        run: a `Run`, the path of a run folder, or the result of `train`.
        destination: the folder to create.
        overrides: `key=value` overrides of the run's config.
        merge: export the full model in float16, with the adapter merged into its weights.
        push: also upload the folder to this repository of the Hugging Face hub.

    Raises:
        ConfigError: an override or the repository name is invalid.
        PipelineError: the run is not finished, `destination` exists, the disk is full, or the upload failed. If the
            upload failed, the folder is complete.
    """
    started = time.perf_counter()
    run, destination = Run.of(run), Path(destination)
    config = run.trained_config(tuple(overrides))
    if push:
        hub.check_repo_name(push)
    with _new_folder(destination) as folder:
        if merge:
            _write_merged(run, config, folder)
        else:
            _copy_files(run.adapter, folder)
        write_text(folder / "README.md", model_card(run, config, merge))
        copy_permissions(folder / "README.md", folder)
    size_in_bytes = sum(path.stat().st_size for path in destination.rglob("*"))
    differences = compare_merged(run, config, destination) if merge else None
    url = hub.push(destination, push) if push else None
    return ExportResult(
        run=str(run.path),
        destination=str(destination),
        merged=merge,
        bytes=size_in_bytes,
        differences=differences,
        url=url,
        seconds=time.perf_counter() - started,
    )


@contextmanager
def _new_folder(destination: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `destination` at the end, and deleted if anything fails."""
    if os.path.lexists(destination):
        raise PipelineError(f"{destination}: exists already; choose another folder, or move it away")
    require_utf8(destination)
    partial = destination.with_name(destination.name + ".partial")
    if os.path.lexists(partial):
        raise PipelineError(
            f"{partial}: left by an export that was killed, or in use by one that is running; delete it, and export "
            "again"
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
    """Copy the files without their permissions: copies of read-only files must be writable."""
    for path in source.rglob("*"):
        if path.is_file():
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _write_merged(run: Run, config: Config, folder: Path) -> None:
    model = config.model
    checkpoint = fetch_checkpoint(model.checkpoint, model.revision, (*ENCODER_PREFIXES, *LANGUAGE_MODEL_PREFIXES))
    needed, free = merged_bytes(checkpoint) + SMALL_FILES_BYTES, free_disk_bytes(folder)
    if needed > free:
        raise PipelineError(
            f"{folder.parent}: the merged model needs {format_bytes(needed)}, and {format_bytes(free)} are free. "
            "Free disk space, or export to another disk"
        )
    write_merged(checkpoint, load_adapter(load_base(config), run.adapter), folder)


class _Outputs(NamedTuple):
    """A model's outputs on the compared questions."""

    answers: list[str]
    logits: Tensor
    """(L, vocabulary), at the tokens of the run's answers."""


def compare_merged(run: Run, config: Config, merged: Path) -> dict[str, float] | None:
    """Compare the merged model with the run on up to `MAX_COMPARED` cached questions of `evaluate.split`.

    Both compute in the run's dtype, so the differences are those of merging: float16 weights and their rounding.

    Returns:
        `questions`; `equal_answers`, in percent; `max_logit_difference` and `mean_logit_difference`, absolute, at the
        tokens of the run's answers. None, with a warning, if there is no cache or too little memory.
    """
    try:
        return _compare(run, config, merged)
    except (CacheError, PipelineError) as error:
        reason = str(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = "out of memory; try a smaller evaluate.batch_size"
    log_warning(f"the merged model is not compared with the run: {reason}")
    return None


def _compare(run: Run, config: Config, merged: Path) -> dict[str, float]:
    _check_memory(config, merged)
    builder = open_split(config, config.evaluate.split, trained=False, answered=True)
    questions = np.unique(np.linspace(0, len(builder.text) - 1, min(MAX_COMPARED, len(builder.text)), dtype=np.int64))
    merged_config = config.model_copy(
        update={
            "model": ModelConfig(checkpoint=str(merged)),
            "quantization": config.quantization.model_copy(update={"bits": None}),
        }
    )
    expected = _compute_outputs(config, run.adapter, builder, questions)
    gc.collect()  # one model at a time
    give_back_memory()
    found = _compute_outputs(merged_config, None, builder, questions, expected.answers)
    distances = (expected.logits - found.logits).abs()
    equal = [a == b for a, b in zip(expected.answers, found.answers, strict=True)]
    return {
        "questions": len(questions),
        "equal_answers": 100 * float(np.mean(equal)),
        "max_logit_difference": float(distances.max()),
        "mean_logit_difference": float(distances.mean()),
    }


def _check_memory(config: Config, merged: Path) -> None:
    device = pick_device()
    itemsize = pick_dtype(config.quantization.compute_dtype, device).itemsize
    needed, free = merged_bytes(merged) * itemsize // 2, free_memory_bytes(device)
    if needed > free:
        raise PipelineError(f"it needs {format_bytes(needed)} of memory, and {format_bytes(free)} are free")


def _compute_outputs(
    config: Config,
    adapter: Path | None,
    builder: SequenceBuilder,
    questions: np.ndarray,
    targets: list[str] | None = None,
) -> _Outputs:
    """Return a model's answers, and its logits at the tokens of `targets`, by default its own answers."""
    tokenizer = load_tokenizer(config)
    model: PreTrainedModel = load_base(config)
    if adapter:
        model = load_adapter(model, adapter)
        keep_weights_trainable(model)
    generated = answer_questions(model, builder, questions, tokenizer, config.evaluate)
    answers = [generated[index].text for index in questions.tolist()]
    tokens = dict(zip(questions.tolist(), tokenizer.targets(targets or answers), strict=True))
    device = next(model.parameters()).device
    logits = []
    for start in range(0, len(questions), config.evaluate.batch_size):
        batch = questions[start : start + config.evaluate.batch_size]
        inputs = pack(builder.for_training(batch, targets=lambda index: [(np.array(tokens[index]), 1.0)]))
        inputs = {name: inputs[name] for name in (*TREE_INPUTS, "label_indices")}
        with torch.inference_mode():
            logits.append(model.logits(**send_to_device(inputs, device)).cpu())
    return _Outputs(answers, torch.cat(logits))
