"""Grids: every combination of listed values, trained by one command."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import pipeline.commands.grid
from pipeline.blip2.language_model import Blip2LanguageHalf
from pipeline.cli import main
from pipeline.commands.grid import train_grid
from pipeline.commands.train import StoppedError, load_for_training, train_run
from pipeline.common.errors import PipelineError
from pipeline.config import Config
from pipeline.overrides import combinations_of
from pipeline.runs.run import next_run

NAME = "adapter_model.safetensors"


@pytest.fixture
def config_path(cached: Config, tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    train_section = cached.train.model_copy(update={"max_steps": 3, "output_dir": tmp_path / "runs"})
    path.write_text(cached.model_copy(update={"train": train_section}).to_yaml())
    return path


def pipe_train(config: Path, *words: str) -> tuple[int, dict[str, object], str]:
    done = CliRunner().invoke(main, ["train", str(config), *words, "--json"])
    return done.exit_code, json.loads(done.stdout) if done.stdout else {}, done.stderr


@pytest.mark.parametrize(
    ("overrides", "varied", "fixed"),
    [
        (("lora.r=8,16", "train.epochs=1"), [{"lora.r": "8"}, {"lora.r": "16"}], ("train.epochs=1",)),
        (("lora.target_modules=[q_proj,v_proj]",), [{}], ("lora.target_modules=[q_proj,v_proj]",)),
        (
            ("lora.target_modules=[q_proj],[q_proj, v_proj]",),
            [{"lora.target_modules": "[q_proj]"}, {"lora.target_modules": "[q_proj, v_proj]"}],
            (),
        ),
        (("data.prompt=Q, {question}",), [{}], ("data.prompt=Q, {question}",)),
        (("cache.dir=a,b",), [{}], ("cache.dir=a,b",)),
        (("train.lr_scheduler=linear,cosine",), [{"train.lr_scheduler": one} for one in ("linear", "cosine")], ()),
    ],
)
def test_listed_values_are_varied_but_lists_and_texts_are_not(
    overrides: tuple[str, ...], varied: list[dict[str, str]], fixed: tuple[str, ...]
) -> None:
    assert combinations_of(overrides, Config) == (varied, fixed)


def test_two_listed_keys_give_every_combination() -> None:
    varied, _ = combinations_of(("lora.r=8,16,32", "train.learning_rate=1e-4,3e-4"), Config)
    assert len(varied) == 6
    assert varied[1] == {"lora.r": "8", "train.learning_rate": "3e-4"}


def test_grid_equals_separate_trainings_and_loads_the_model_once(
    config_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loads = []

    def load(config: Config) -> Blip2LanguageHalf:
        loads.append(config)
        return load_for_training(config)

    monkeypatch.setattr(pipeline.commands.grid, "load_for_training", load)
    status, summary, _ = pipe_train(config_path, "lora.r=4,8", "train.learning_rate=1e-3,3e-3", "--name", "grid")
    assert (status, summary["failed_runs"], len(loads)) == (0, 0, 1)
    names = [Path(str(row["run"])).name for row in summary["runs"]]
    assert names[0] == "grid-r=4-learning_rate=1e-3"
    assert len(set(names)) == 4
    pipe_train(config_path, "lora.r=8", "train.learning_rate=3e-3", "--name", "alone")
    alone, last = tmp_path / "runs" / "alone", tmp_path / "runs" / names[-1]
    assert (alone / "adapter" / NAME).read_bytes() == (last / "adapter" / NAME).read_bytes()


def test_failed_run_does_not_stop_the_others(config_path: Path) -> None:
    words = ["train.learning_rate=1e-3,1e30,2e-3", "--name", "grid"]
    status, summary, stderr = pipe_train(config_path, *words)
    assert (status, summary["failed_runs"]) == (1, 1)
    assert [sorted(row.keys() & {"failed", "steps"}) for row in summary["runs"]] == [["steps"], ["failed"], ["steps"]]
    assert "training diverged" in str(summary["runs"][1]["failed"])
    assert "grid-learning_rate=1e30 failed" in stderr


def test_unknown_target_module_is_an_error_before_training(config_path: Path) -> None:
    status, _, stderr = pipe_train(config_path, "lora.target_modules=[q_proj],[nothing]", "--name", "grid")
    assert status == 2
    assert "lora.target_modules: 'nothing' matches nothing in the language model" in stderr
    assert not (config_path.parent / "runs").exists()


def test_interrupted_grid_can_be_resumed(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["lora.r=4,8,16", "--name", "grid"]

    def interrupt_second(config: Config, *args: Any) -> object:
        if config.lora.r == 8:
            raise StoppedError("Interrupted at step 1 of 3. Resume: `pipe train runs/grid-r=8 --resume`")
        return train_run(config, *args)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.commands.grid, "train_run", interrupt_second)
        status, _, stderr = pipe_train(config_path, *words)
    assert status == 1
    assert "grid-r=8 --resume`; for all runs of the grid: rerun this command with --resume" in stderr
    status, summary, _ = pipe_train(config_path, *words, "--resume")
    assert (status, [row["steps"] for row in summary["runs"]]) == (0, [3, 3, 3])
    assert pipe_train(config_path, *words)[0] == 1, "the runs exist already"


def test_resume_of_a_grid_needs_its_name(config_path: Path) -> None:
    status, _, stderr = pipe_train(config_path, "lora.r=4,8", "--resume")
    assert status == 2
    assert "--resume of several trainings needs their --name" in stderr


def test_invalid_value_is_an_error_before_training(config_path: Path, tmp_path: Path) -> None:
    status, _, stderr = pipe_train(config_path, "lora.r=8,-1", "--name", "grid")
    assert status == 2
    assert "lora.r" in stderr
    assert not (tmp_path / "runs").exists()


def test_several_ranks_are_an_error(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PipelineError, match="cannot run under torchrun"):
        train_grid(config_path, ["lora.r=4,8"], "grid")


def test_next_run_skips_numbers_of_grids(tmp_path: Path) -> None:
    for name in ("mine-1-r=8", "mine-2", "mine-30"):
        (tmp_path / name).mkdir()
    assert next_run(tmp_path, "mine").path.name == "mine-3"
