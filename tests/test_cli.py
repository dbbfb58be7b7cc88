"""What a user sees: exit status, one line of what went wrong, one JSON object on stdout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import write_config

from pipeline.cli import main
from pipeline.config import Config, load_config

COMMANDS = sorted(main.commands)


def pipe(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_commands_are_the_documented_ones() -> None:
    assert COMMANDS == ["evaluate", "precompute", "quickstart", "train"]
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for command in COMMANDS:
        assert f"pipe {command}" in readme


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_by_default_and_gives_an_example(command: str) -> None:
    text = pipe(command, "--help").output
    assert "Example:  pipe " + command in text
    assert "--json" in text
    assert "by default" in text.lower()


def test_the_defaults_that_help_names_are_the_configs() -> None:
    config = Config.model_validate({"data": {"train": {}}, "cache": {"dir": "x"}})
    train = " ".join(pipe("train", "--help").output.split())
    assert f"By default {config.train.epochs:g} epochs of {config.train.batch_size} questions a step" in train
    assert f"r={config.lora.r}, alpha={config.lora.alpha}, learning rate 2e-4 with {config.train.lr_scheduler}" in train
    assert config.train.learning_rate == 2e-4
    precompute = " ".join(pipe("precompute", "--help").output.split())
    assert (
        f"By default {config.precompute.batch_size} pictures at a time, features in {config.cache.dtype}" in precompute
    )
    shipped = load_config(Path(__file__).parents[1] / "configs" / "easy_vqa.yaml")
    quickstart = " ".join(pipe("quickstart", "--help").output.split())
    assert (shipped.train.epochs, shipped.train.batch_size, shipped.lora.r, shipped.train.seed) == (1, 64, 16, 0)
    assert "By default one epoch of 64 questions a step, r=16, seed 0" in quickstart


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from pipeline.cli import main;"
        "assert CliRunner().invoke(main, ['train', '--help']).exit_code == 0;"
        "print([m for m in ('torch', 'transformers', 'pydantic', 'numpy', 'h5py') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["precompute", "nowhere.yaml"], 2, "pipe: nowhere.yaml: no such config file"),
        (["train", "CONFIG", "train.epochz=1"], 2, "unknown key train.epochz; did you mean epochs?"),
        (["train", "CONFIG", "train.epochs=[]"], 2, "train.epochs: input should be a valid number"),
        (["train", "CONFIG", "--resume"], 2, "--resume needs the --name of the run"),
        (["frobnicate"], 2, "No such command 'frobnicate'"),
        (["train", "CONFIG"], 1, "run `pipe precompute` first"),
        (["precompute", "CONFIG", "model.checkpoint=/no/such/folder"], 1, "neither a folder here nor to be had"),
        (
            ["precompute", "CONFIG", "data.train.images=/no/such/folder"],
            1,
            "54 questions (not there: /no/such/folder/0.png",
        ),
        (["precompute", "CONFIG", "data.train.annotations=/no/such/file"], 1, "/no/such/file"),
        (["precompute", "CONFIG", "data.format=vqav2"], 1, "data.train.questions is not set"),
        (["precompute", "CONFIG", "data.format=vqa"], 1, "no data.format 'vqa'"),
        (["precompute", "CONFIG", "cache.dir=/proc/nothing"], 1, "/proc/nothing"),
        (["evaluate", "/no/such/run"], 1, "/no/such/run: not a run folder"),
    ],
)
def test_bad_input_is_told_in_a_line_or_two(data_set: Path, words: list[str], status: int, message: str) -> None:
    before = sorted(data_set.rglob("*"))
    done = pipe(*[data_set / "config.yaml" if word == "CONFIG" else word for word in words])
    assert done.exit_code == status, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output
    told = [line for line in done.stderr.splitlines() if "pictures/s" not in line]
    assert len(told) <= 4
    assert done.stdout == ""
    report = data_set / "cache.left-out.jsonl"  # where all that cannot be used is listed
    assert sorted(path for path in data_set.rglob("*") if path != report) == before


def test_a_missing_easy_vqa_package_is_told(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.vqa.find_spec", lambda name: None)
    done = pipe("precompute", data_set / "config.yaml", "data={format: easy_vqa, train: {}}")
    assert done.exit_code == 1
    assert "pip install easy-vqa" in done.stderr


def test_debug_shows_the_traceback(data_set: Path) -> None:
    done = pipe("train", data_set / "config.yaml", "--debug")
    assert "no cache at" in str(done.exception)


def test_json_is_one_object_on_stdout_and_progress_is_on_stderr(data_set: Path) -> None:
    config = data_set / "config.yaml"
    keys = {
        "precompute": {"cache", "images", "encoded", "reused", "failed", "seconds", "images_per_second"},
        "train": {"run", "steps", "train_loss", "questions_per_second", "seconds"},
        "evaluate": {"run", "questions", "accuracy", "per_answer_type"},
    }
    for command, words in (
        ("precompute", [config]),
        ("train", [config, "--name", "first"]),
        ("evaluate", [data_set / "runs" / "first"]),
    ):
        done = pipe(command, *words, "--json")
        assert done.exit_code == 0, done.output
        assert keys[command] <= json.loads(done.stdout).keys()
        assert len(done.stdout.splitlines()) == 1
        assert "/s" in done.stderr


def test_the_summary_is_a_table_without_json(data_set: Path) -> None:
    done = pipe("precompute", data_set / "config.yaml")
    assert done.exit_code == 0
    assert any(line.split() == ["encoded", "24"] for line in done.stdout.splitlines())


def test_the_installed_command_runs_in_a_folder_of_the_users(cached: Config, tmp_path: Path) -> None:
    config = write_config(tmp_path, cache={"dir": str(cached.cache.dir)}, train={"output_dir": "my runs"})
    command = [str(Path(sys.executable).with_name("pipe")), "train", str(config), "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert json.loads(done.stdout)["run"] == "my runs/config-1"
    assert (tmp_path / "my runs" / "config-1" / "adapter" / "adapter_model.safetensors").is_file()
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
