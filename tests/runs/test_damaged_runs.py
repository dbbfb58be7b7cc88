"""Damaged files of a run: training resumes from what is valid, and logs or names what is not."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from runs import files_of, with_train
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.cli import main
from pipeline.commands.evaluate import evaluate
from pipeline.commands.grid import BaseModelCache
from pipeline.commands.train import train_run
from pipeline.common.errors import PipelineError
from pipeline.config import Config
from pipeline.runs.checkpoints import COMPLETE_MARKER, mark_complete, newest_valid_checkpoint
from pipeline.runs.jsonl import read_jsonl
from pipeline.runs.record import read_evaluations, read_record
from pipeline.runs.run import Run
from pipeline.training.lora_monitor import CHECKPOINT_FILE

FILES = ["adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
         "trainer_state.json", "training_args.bin", CHECKPOINT_FILE]  # fmt: skip


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


DAMAGES: list[Callable[[Path], None]] = [cut, empty, change, Path.unlink]


@pytest.fixture(scope="module")
def config(cached: Config) -> Config:
    return with_train(cached, max_steps=4, save_steps=2, lora_monitor_steps=3, batch_size=2)


@pytest.fixture(scope="module")
def load() -> BaseModelCache:
    return BaseModelCache()


@pytest.fixture(scope="module")
def finished(config: Config, load: BaseModelCache, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("finished") / "run")
    train_run(config, run, load=load)
    return run


@pytest.fixture
def stopped(finished: Run, tmp_path: Path) -> Run:
    """The finished run before its adapter was saved, with two checkpoints."""
    run = Run(tmp_path / "run")
    shutil.copytree(finished.path, run.path)
    shutil.rmtree(run.adapter)
    return run


def checkpoint(run: Run, step: int) -> Path:
    return run.checkpoints / f"checkpoint-{step}"


def test_marker_lists_every_file_of_a_checkpoint(stopped: Run) -> None:
    assert {*FILES, COMPLETE_MARKER} <= files_of(checkpoint(stopped, 2)).keys()
    assert json.loads((checkpoint(stopped, 2) / COMPLETE_MARKER).read_text()).keys() == {
        name for name in files_of(checkpoint(stopped, 2)) if name != COMPLETE_MARKER
    }


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", [*FILES, COMPLETE_MARKER])
def test_newest_valid_checkpoint_is_used(
    stopped: Run, name: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    newest = checkpoint(stopped, 4)
    shutil.copy(checkpoint(stopped, 2) / CHECKPOINT_FILE, newest)  # only some steps have one
    mark_complete(newest)
    damage(newest / name)
    assert newest_valid_checkpoint(stopped.checkpoints, "") == checkpoint(stopped, 2)
    log = capsys.readouterr().err
    if (name, damage) != (COMPLETE_MARKER, Path.unlink):  # without its marker it is incomplete, not damaged
        assert f"{newest}: damaged, {'' if name == COMPLETE_MARKER else name}" in log
        assert "kept as damaged-checkpoint-4. Resuming from checkpoint-2" in log
        assert not newest.exists()


def test_training_resumes_from_the_previous_checkpoint_to_the_same_adapter(
    stopped: Run, finished: Run, config: Config, load: BaseModelCache
) -> None:
    change(checkpoint(stopped, 4) / "optimizer.pt")
    train_run(config, stopped, True, load)
    assert files_of(stopped.adapter) == files_of(finished.adapter)
    assert [row["step"] for row in read_jsonl(stopped.metrics)] == [1, 2, 3, 4]


def test_all_checkpoints_damaged_is_an_error_with_advice(
    stopped: Run, finished: Run, config: Config, load: BaseModelCache
) -> None:
    cut(checkpoint(stopped, 4) / "optimizer.pt")
    cut(checkpoint(stopped, 2) / "trainer_state.json")
    before = sorted(stopped.path.rglob("*"))
    with pytest.raises(PipelineError) as error:
        train_run(config, stopped, True, load)
    assert "all checkpoints are damaged (checkpoint-4: optimizer.pt does not match its checksum; " in str(error.value)
    assert f"pipe train {stopped.config} --name ANOTHER; or delete {stopped.checkpoints} and resume" in str(error.value)
    assert sorted(stopped.path.rglob("*")) == before
    shutil.rmtree(stopped.checkpoints)
    train_run(config, stopped, True, load)
    assert files_of(stopped.adapter) == files_of(finished.adapter)


def test_damaged_record_or_log_does_not_stop_training(
    stopped: Run, finished: Run, config: Config, load: BaseModelCache, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(checkpoint(stopped, 4))
    stopped.record.write_bytes(b'{"seed"\xff')
    lines = stopped.metrics.read_bytes().splitlines(keepends=True)
    stopped.metrics.write_bytes(lines[0] + b"\xff\xfe not JSON\n[1]\n{}\n" + lines[1] + b'{"step": 3')
    stopped.lora_updates.write_bytes(b"\0" * 100)
    train_run(config, stopped, True, load)
    assert files_of(stopped.adapter) == files_of(finished.adapter)
    assert [row["step"] for row in read_jsonl(stopped.metrics)] == [1, 2, 3, 4]
    assert read_record(stopped)["summary"]["steps"] == 4
    assert f"{stopped.metrics}: 3 damaged lines are skipped" in capsys.readouterr().err


def test_damaged_evaluation_is_skipped_and_logged(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (b"", b"{", b"\xff", b"[]", b"{}"):
        finished.evaluation("val", True).write_bytes(content)
        assert read_evaluations(finished) == []
    finished.evaluation("val", True).unlink()
    assert capsys.readouterr().err.count("evaluation-val.json: damaged, skipped") == 4


def test_damaged_config_is_an_error(stopped: Run) -> None:
    stopped.config.write_bytes(b"model: {check\xff")
    done = CliRunner().invoke(main, ["train", str(stopped.path), "--resume"])
    assert done.exit_code == 2
    assert f"pipe: {stopped.config}: not a YAML file" in done.stderr


def test_damaged_best_adapter_is_not_chosen(
    config: Config,
    load: BaseModelCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    validated = config.model_copy(
        update={"validation": config.validation.model_copy(update={"steps": 1, "questions": 3})}
    )
    run = Run(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.commands.train._save_adapter", lambda *_: exit())
        with pytest.raises(SystemExit):
            train_run(validated, run, load=load)
    load.clear()
    rows = read_jsonl(run.validation)
    run.validation.write_text("".join(json.dumps(row | {"accuracy": 90 - row["step"]}) + "\n" for row in rows))
    cut(run.best_adapter(1) / "adapter_model.safetensors")
    assert run.best_adapter(2).is_dir(), "each step was the best so far"
    assert train_run(validated, run, True, load).validation["best_step"] == 2
    assert f"{run.best_adapter(1)}/adapter_model.safetensors: damaged" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [cut, empty, Path.unlink], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_damaged_adapter_is_an_error_with_advice(
    finished: Run, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(finished.path, run.path)
    damage(run.adapter / name)
    for words in (("evaluate",), ("ask", "picture.png", "what?"), ("export", str(tmp_path / "out"))):
        done = CliRunner().invoke(main, [words[0], str(run.path), *words[1:]])
        assert done.exit_code == 1
        [line] = done.stderr.splitlines()
        assert line.startswith(f"pipe: {run.adapter / name}: ")
        assert f"delete {run.adapter} and run `pipe train {run.path} --resume`" in line
    assert not (tmp_path / "out").exists()
    reported = CliRunner().invoke(main, ["report", str(run.path)])
    assert reported.exit_code == 0
    assert f"{run.adapter / name}: " in reported.stderr


def damaged_adapter(finished: Run, folder: Path, damage: Callable[[dict[str, Tensor]], object]) -> Run:
    run = Run(folder / "run")
    shutil.copytree(finished.path, run.path)
    path = run.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    return run


@pytest.fixture(scope="module")
def with_biases(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("biases") / "run")
    train_run(config.model_copy(update={"lora": config.lora.model_copy(update={"bias": "all"})}), run)
    return run


@pytest.mark.parametrize("kind", [".lora_A.weight", ".lora_B.weight", ".bias"])
def test_adapter_without_a_tensor_is_an_error(with_biases: Run, tmp_path: Path, kind: str) -> None:
    """PEFT would silently use a new tensor, which has no effect, or the checkpoint's bias."""
    removed: list[str] = []

    def remove(tensors: dict[str, Tensor]) -> None:
        removed.append(next(name for name in sorted(tensors) if name.endswith(kind)))
        del tensors[removed[0]]

    run = damaged_adapter(with_biases, tmp_path, remove)
    with pytest.raises(PipelineError, match=f"missing {re.escape(removed[0])}"):
        evaluate(run)


def test_nonfinite_adapter_is_an_error(finished: Run, tmp_path: Path) -> None:
    run = damaged_adapter(finished, tmp_path, lambda tensors: nn.init.constant_(tensors[max(tensors)], torch.nan))
    with pytest.raises(PipelineError, match=r"lora_B\.weight is not finite"):
        evaluate(run)


@pytest.mark.parametrize(("key", "value"), [("r", "wide"), ("target_modules", 7), ("lora_alpha", None), ("bias", "x"),
                                            ("peft_type", "NONE"), ("target_modules", ["other"])])  # fmt: skip
def test_invalid_adapter_config_is_an_error(finished: Run, tmp_path: Path, key: str, value: object) -> None:
    run = damaged_adapter(finished, tmp_path, lambda tensors: None)
    path = run.adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(PipelineError, match=re.escape(f"{run.adapter}: not an adapter of this model (")):
        evaluate(run)
