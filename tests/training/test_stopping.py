"""A training that is told to stop, or killed, goes on as if it never had been."""

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

from pipeline.batches.sequences import ImageSequence, SequenceBuilder
from pipeline.cli import main
from pipeline.commands.train import StoppedError, train
from pipeline.common.errors import PipelineError
from pipeline.config import Config
from pipeline.runs.run import Run
from pipeline.training.stopping import GracefulStopCallback, StopRequest


def with_train(config: Config, **settings: object) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=settings)})


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rows_of(path: Path) -> list[dict[str, float]]:
    """Without what the clock decides."""
    return [{**json.loads(line), "loader_wait": 0} for line in path.read_text().splitlines()]


def signalled(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, batch: int) -> None:
    """The process gets the signal when a training lays out its n-th batch."""
    build_sequences, batches = SequenceBuilder.for_training, []

    def signal_in_the_middle(self: SequenceBuilder, questions: list[int], *how: object) -> list[ImageSequence]:
        batches.append(questions)
        if len(batches) == batch:
            os.kill(os.getpid(), number)
        return build_sequences(self, questions, *how)

    monkeypatch.setattr(SequenceBuilder, "for_training", signal_in_the_middle)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_first_and_says_how_to_go_on(cached: Config, tmp_path: Path, number: signal.Signals) -> None:
    config = with_train(cached, max_steps=8, save_steps=100)
    whole, stopped = Run(tmp_path / "whole"), Run(tmp_path / "stopped")
    train(config, whole)
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        signalled(patch, number, batch=5)
        with pytest.raises(
            StoppedError, match=rf"stopped at step \d of 8, saved; it goes on with: pipe train {stopped.path} --resume"
        ):
            train(config, stopped)
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    checkpoint = stopped.last_checkpoint()
    assert checkpoint is not None
    assert not stopped.adapter.exists()
    train(config, stopped, resume=True)
    assert files_of(stopped.adapter) == files_of(whole.adapter)
    assert rows_of(stopped.metrics) == rows_of(whole.metrics)
    assert stopped.watch.read_bytes() == whole.watch.read_bytes()


def test_a_run_that_is_being_trained_is_left_alone(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache.lock.LOCK_TIMEOUT_SECONDS", 0)
    run = Run(tmp_path / "run")
    train(with_train(cached, max_steps=4), run)
    logged = run.metrics.read_bytes()
    shutil.rmtree(run.adapter)
    held = run.hold()
    with pytest.raises(PipelineError, match=rf"{run.path}: process {os.getpid()} .* is training this run"):
        train(with_train(cached, max_steps=4), run, resume=True)
    with pytest.raises(PipelineError, match="is still training this run"):
        run.check_finished()
    assert run.metrics.read_bytes() == logged
    held.release()
    with pytest.raises(PipelineError, match="go on with it by"):
        run.check_finished()


def test_the_folder_is_held_until_the_adapter_is_in_place(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache.lock.LOCK_TIMEOUT_SECONDS", 0)
    run, held = Run(tmp_path / "run"), []
    monkeypatch.setattr("pipeline.commands.train.write_card", lambda run, _: held.append(run.is_held))
    train(cached, run)
    assert held == [True]
    assert not run.is_held


def test_the_loss_of_a_resumed_training_is_that_of_all_its_steps(cached: Config, tmp_path: Path) -> None:
    config = with_train(cached, max_steps=8, save_steps=100)
    whole = train(config, Run(tmp_path / "whole"))
    stopped = Run(tmp_path / "stopped")
    with pytest.MonkeyPatch.context() as patch:
        signalled(patch, signal.SIGTERM, batch=5)
        with pytest.raises(StoppedError):
            train(config, stopped)
    assert train(config, stopped, resume=True)["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-4)


def test_the_second_signal_stops_at_once() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.made
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_in_the_last_step_ends_as_any_training(cached: Config, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        signalled(patch, signal.SIGTERM, batch=1)
        summary = train(with_train(cached, max_steps=1), Run(tmp_path / "run"))
    assert summary["steps"] == 1


def test_checkpoints_by_the_clock_and_only_the_newest(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    train(with_train(cached, max_steps=6, save_steps=100, save_minutes=1e-9, save_total_limit=3), run)
    assert {path.name for path in run.checkpoints.iterdir()} == {"checkpoint-4", "checkpoint-5", "checkpoint-6"}
    by_steps = Run(tmp_path / "by_steps")
    train(with_train(cached, max_steps=6, save_steps=4, save_minutes=None), by_steps)
    assert {path.name for path in by_steps.checkpoints.iterdir()} == {"checkpoint-4", "checkpoint-6"}
    assert GracefulStopCallback(StopRequest(), None).seconds == float("inf")


def test_resume_takes_the_runs_folder(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    train(cached, run)
    shutil.rmtree(run.adapter)
    done = CliRunner().invoke(main, ["train", str(run.path), "--resume", "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["run"] == str(run.path)
    wrong = CliRunner().invoke(main, ["train", str(run.config), "--resume"])
    assert wrong.exit_code == 2
    assert "give its folder in place of CONFIG" in wrong.stderr


def test_trackers_are_named_and_a_wrong_one_is_told(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    train(with_train(cached, report_to=("tensorboard",)), run)
    assert list((run.path / "tensorboard").glob("events*"))
    with pytest.raises(PipelineError, match=r"train.report_to \['tensorbord'\]: .*not supported"):
        train(with_train(cached, report_to=("tensorbord",)), Run(tmp_path / "wrong"))
    assert not (tmp_path / "wrong").exists()


def test_a_kill_while_the_adapters_are_put_in_place_is_made_good(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = cached.validation.model_copy(update={"steps": 1})
    config = with_train(cached, max_steps=4, save_steps=1).model_copy(update={"validation": validation})
    run, whole = Run(tmp_path / "run"), Run(tmp_path / "whole")
    monkeypatch.setattr("pipeline.training.validation.Validator.__call__", lambda *_: np.array([50.0, 1, 0.5, 1]))
    train(config, whole)
    rename = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda self, to: _fail() if to == run.adapter else rename(self, to))
        with pytest.raises(KeyboardInterrupt):
            train(config, run)
    assert run.last_adapter.exists()
    assert not run.adapter.exists()
    train(config, run, resume=True)
    name = "adapter_model.safetensors"
    for one, other in ((run.adapter, whole.adapter), (run.last_adapter, whole.last_adapter)):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def _fail() -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_killed_at_20_moments_and_resumed_each_time_it_ends_in_the_same_adapter(cached: Config, tmp_path: Path) -> None:
    """kill -9 of the real command, at random moments of a training with validation; then what was left is resumed."""
    config = with_train(cached, max_steps=40, save_steps=3, output_dir=tmp_path)
    config = config.model_copy(update={"validation": config.validation.model_copy(update={"steps": 5})})
    whole, killed = Run(tmp_path / "whole"), Run(tmp_path / "killed")
    train(config, whole)
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
        if killed.adapter.exists() and kills < 20:  # it was faster than the kill: all over again
            shutil.rmtree(killed.path)
            words = [str(tmp_path / "config.yaml"), "--name", "killed"]
    print("kills:", kills)
    assert kills == 20
    assert files_of(killed.adapter) == files_of(whole.adapter)
    assert rows_of(killed.metrics) == rows_of(whole.metrics)
    assert killed.watch.read_bytes() == whole.watch.read_bytes()


def _wait_for_a_checkpoint_or_row(run: Run, running: "subprocess.Popen[bytes]") -> None:
    """Until the process at work has begun to train: something in its folder is new."""

    def state() -> tuple[int, int]:
        size = run.metrics.stat().st_mtime_ns if run.metrics.exists() else 0
        return size, len(list(run.checkpoints.glob("*"))) if run.checkpoints.exists() else 0

    before = state()
    while running.poll() is None and state() == before:
        time.sleep(0.01)
