"""An interrupted or killed training resumes to the result of an uninterrupted one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from runs import files_of, with_train

from pipeline.batches.sequences import ImageSequence, SequenceBuilder
from pipeline.cli import main
from pipeline.commands.train import StoppedError, train_run
from pipeline.common.errors import PipelineError
from pipeline.config import Config
from pipeline.runs.run import Run
from pipeline.training.stopping import GracefulStopCallback, StopRequest


def rows_of(path: Path) -> list[dict[str, float]]:
    """Return the rows without the values that depend on timing."""
    return [{**json.loads(line), "loader_wait": 0} for line in path.read_text().splitlines()]


def send_signal_at_batch(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, batch: int) -> None:
    """Send the signal to this process when training builds its batch number `batch`."""
    build_sequences, batches = SequenceBuilder.for_training, []

    def build_and_signal(self: SequenceBuilder, questions: list[int], *args: object) -> list[ImageSequence]:
        batches.append(questions)
        if len(batches) == batch:
            os.kill(os.getpid(), number)
        return build_sequences(self, questions, *args)

    monkeypatch.setattr(SequenceBuilder, "for_training", build_and_signal)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_a_checkpoint_and_names_the_resume_command(
    cached: Config, tmp_path: Path, number: signal.Signals
) -> None:
    config = with_train(cached, max_steps=8, save_steps=100)
    whole, stopped = Run(tmp_path / "whole"), Run(tmp_path / "stopped")
    train_run(config, whole)
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        send_signal_at_batch(patch, number, batch=5)
        with pytest.raises(
            StoppedError,
            match=rf"Interrupted at step \d of 8. Completed work is saved. Resume: `{stopped.resume_command}`",
        ):
            train_run(config, stopped)
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    checkpoint = stopped.last_checkpoint()
    assert checkpoint is not None
    assert not stopped.adapter.exists()
    train_run(config, stopped, resume=True)
    assert files_of(stopped.adapter) == files_of(whole.adapter)
    assert rows_of(stopped.metrics) == rows_of(whole.metrics)
    assert stopped.lora_updates.read_bytes() == whole.lora_updates.read_bytes()


def test_locked_run_is_not_changed(cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache.lock.LOCK_TIMEOUT_SECONDS", 0)
    run = Run(tmp_path / "run")
    train_run(with_train(cached, max_steps=4), run)
    logged = run.metrics.read_bytes()
    shutil.rmtree(run.adapter)
    with run.locked():
        with pytest.raises(PipelineError, match=rf"{run.path}: process {os.getpid()} .* is training this run"):
            train_run(with_train(cached, max_steps=4), run, resume=True)
        with pytest.raises(PipelineError, match="is still training this run"):
            run.check_finished()
    assert run.metrics.read_bytes() == logged
    with pytest.raises(PipelineError, match="has no adapter yet; resume it: `pipe train"):
        run.check_finished()


def test_run_is_locked_until_the_adapter_is_saved(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache.lock.LOCK_TIMEOUT_SECONDS", 0)
    run, locked = Run(tmp_path / "run"), []
    monkeypatch.setattr("pipeline.commands.train.write_card", lambda run, _: locked.append(run.is_locked))
    train_run(cached, run)
    assert locked == [True]
    assert not run.is_locked


def test_loss_of_a_resumed_training_covers_all_steps(cached: Config, tmp_path: Path) -> None:
    config = with_train(cached, max_steps=8, save_steps=100)
    whole = train_run(config, Run(tmp_path / "whole"))
    stopped = Run(tmp_path / "stopped")
    with pytest.MonkeyPatch.context() as patch:
        send_signal_at_batch(patch, signal.SIGTERM, batch=5)
        with pytest.raises(StoppedError):
            train_run(config, stopped)
    assert train_run(config, stopped, resume=True).train_loss == pytest.approx(whole.train_loss, rel=1e-4)


def test_second_signal_raises_keyboard_interrupt() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_signal_in_the_last_step_finishes_the_training(cached: Config, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        send_signal_at_batch(patch, signal.SIGTERM, batch=1)
        result = train_run(with_train(cached, max_steps=1), Run(tmp_path / "run"))
    assert result.steps == 1


def test_checkpoints_are_saved_by_time_and_old_ones_removed(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    train_run(with_train(cached, max_steps=6, save_steps=100, save_minutes=1e-9, save_total_limit=3), run)
    assert {path.name for path in run.checkpoints.iterdir()} == {"checkpoint-4", "checkpoint-5", "checkpoint-6"}
    by_steps = Run(tmp_path / "by_steps")
    train_run(with_train(cached, max_steps=6, save_steps=4, save_minutes=None), by_steps)
    assert {path.name for path in by_steps.checkpoints.iterdir()} == {"checkpoint-4", "checkpoint-6"}
    assert GracefulStopCallback(StopRequest(), None).save_seconds == float("inf")


def test_resume_accepts_the_run_folder(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    train_run(cached, run)
    shutil.rmtree(run.adapter)
    done = CliRunner().invoke(main, ["train", str(run.path), "--resume", "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["run"] == str(run.path)
    wrong = CliRunner().invoke(main, ["train", str(run.config), "--resume"])
    assert wrong.exit_code == 2
    assert "give its folder in place of CONFIG" in wrong.stderr


def test_tracker_logs_and_an_unknown_one_is_an_error(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    train_run(with_train(cached, report_to=("tensorboard",)), run)
    assert list((run.path / "tensorboard").glob("events*"))
    with pytest.raises(PipelineError, match=r"train.report_to \['tensorbord'\]: .*not supported"):
        train_run(with_train(cached, report_to=("tensorbord",)), Run(tmp_path / "wrong"))
    assert not (tmp_path / "wrong").exists()


def test_training_killed_while_the_adapters_are_moved_can_be_resumed(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = cached.validation.model_copy(update={"steps": 1})
    config = with_train(cached, max_steps=4, save_steps=1).model_copy(update={"validation": validation})
    run, whole = Run(tmp_path / "run"), Run(tmp_path / "whole")
    monkeypatch.setattr("pipeline.training.validation.Validator.__call__", lambda *_: np.array([50.0, 1, 0.5, 1]))
    train_run(config, whole)
    rename = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda self, to: _fail() if to == run.adapter else rename(self, to))
        with pytest.raises(KeyboardInterrupt):
            train_run(config, run)
    assert run.last_adapter.exists()
    assert not run.adapter.exists()
    train_run(config, run, resume=True)
    name = "adapter_model.safetensors"
    for one, other in ((run.adapter, whole.adapter), (run.last_adapter, whole.last_adapter)):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def _fail() -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_training_killed_at_20_random_times_gives_the_same_adapter(cached: Config, tmp_path: Path) -> None:
    """Kill the real command with SIGKILL at random times of a training with validation, and resume it each time."""
    config = with_train(cached, max_steps=40, save_steps=3, output_dir=tmp_path)
    config = config.model_copy(update={"validation": config.validation.model_copy(update={"steps": 5})})
    whole, killed = Run(tmp_path / "whole"), Run(tmp_path / "killed")
    train_run(config, whole)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    pipe = [sys.executable, "-c", "from pipeline.cli import main; main()", "train"]
    rng, kills, words = random.Random(0), 0, [str(tmp_path / "config.yaml"), "--name", "killed"]
    while not killed.adapter.exists():
        running = subprocess.Popen([*pipe, *words], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        if kills < 20:
            _wait_for_a_checkpoint_or_row(killed, running)
            time.sleep(rng.uniform(0, 0.4))
            running.kill()
            kills += running.wait() == -signal.SIGKILL
        else:
            assert running.wait() == 0
        words = [str(killed.path), "--resume"] if killed.config.exists() else words
        if killed.adapter.exists() and kills < 20:  # finished before the kill: start over
            shutil.rmtree(killed.path)
            words = [str(tmp_path / "config.yaml"), "--name", "killed"]
    print("kills:", kills)
    assert kills == 20
    assert files_of(killed.adapter) == files_of(whole.adapter)
    assert rows_of(killed.metrics) == rows_of(whole.metrics)
    assert killed.lora_updates.read_bytes() == whole.lora_updates.read_bytes()


def _wait_for_a_checkpoint_or_row(run: Run, running: "subprocess.Popen[bytes]") -> None:
    """Wait until the process has started to train: its folder has new content."""

    def state() -> tuple[int, int]:
        size = run.metrics.stat().st_mtime_ns if run.metrics.exists() else 0
        return size, len(list(run.checkpoints.glob("*"))) if run.checkpoints.exists() else 0

    before = state()
    while running.poll() is None and state() == before:
        time.sleep(0.01)
