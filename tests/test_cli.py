"""The command: help, exit status, error messages, and the printed summary."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click import Group, unstyle
from click.testing import CliRunner, Result
from data_set import write_config

from pipeline.cli import main
from pipeline.common.compat import silence_optional_kernel_warning
from pipeline.common.terminal import colorize, format_table
from pipeline.config import Config, load_config


def commands() -> list[str]:
    """Return every command, with the name of its group."""
    groups = {name: group.commands for name, group in main.commands.items() if isinstance(group, Group)}
    grouped = [f"{name} {sub}" for name, subs in groups.items() for sub in subs]
    return sorted([*(set(main.commands) - set(groups)), *grouped])


COMMANDS = commands()


def pipe(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_readme_documents_every_command() -> None:
    assert COMMANDS == ["ask", "benchmark", "cache info", "cache ls", "cache repair", "cache rm", "cache verify",
                        "evaluate", "export", "precompute", "quickstart", "report", "train"]  # fmt: skip
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for command in COMMANDS:
        assert f"pipe {command}" in readme


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_defaults_and_an_example(command: str) -> None:
    text = pipe(*command.split(), "--help").output
    assert "Example:  pipe " + command in text
    assert "--json" in text
    assert "by default" in text.lower()


def test_defaults_in_help_are_those_of_the_config() -> None:
    config = Config.model_validate({"data": {"train": {}}, "cache": {"dir": "x"}})
    train = " ".join(pipe("train", "--help").output.split())
    assert f"By default {config.train.epochs:g} epochs of {config.train.batch_size} questions per step" in train
    assert f"r={config.lora.r}, alpha={config.lora.alpha}, learning rate 2e-4 with {config.train.lr_scheduler}" in train
    assert config.train.learning_rate == 2e-4
    precompute = " ".join(pipe("precompute", "--help").output.split())
    assert f"By default {config.precompute.batch_size} images per batch, features in {config.cache.dtype}" in precompute
    shipped = load_config(Path(__file__).parents[1] / "configs" / "easy_vqa.yaml")
    quickstart = " ".join(pipe("quickstart", "--help").output.split())
    assert (shipped.train.epochs, shipped.train.batch_size, shipped.lora.r, shipped.train.seed) == (1, 64, 16, 0)
    assert "By default it trains one epoch with 64 questions per step, r=16 and seed 0" in quickstart


@pytest.mark.parametrize("command", ["", "cache", *COMMANDS])
def test_help_fits_on_a_screen_with_one_line_per_option(command: str) -> None:
    lines = pipe(*command.split(), "--help").output.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    options = lines[lines.index("Options:") + 1 :]
    options = options[: options.index("")] if "" in options else options
    assert all(re.match(r"  -\S.*  \w", line) for line in options), options


def test_short_help_is_not_truncated() -> None:
    assert "..." not in pipe("--help").output.partition("Commands:")[2]
    assert "..." not in pipe("cache", "--help").output.partition("Commands:")[2]


def test_help_imports_no_large_library() -> None:
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
        (["train", "CONFIG", "--resume"], 2, "--resume needs a run: give its folder"),
        (["train", "CONFIG", "--name", "../evil"], 2, "'../evil' is not a plain folder name"),
        (["train", "CONFIG", "--name", ".."], 2, "'..' is not a plain folder name"),
        (["frobnicate"], 2, "No such command 'frobnicate'"),
        (["train", "CONFIG"], 1, "Run `pipe precompute` first"),
        (
            ["precompute", "CONFIG", "model.checkpoint=/no/such/folder"],
            1,
            "/no/such/folder (model.checkpoint): no such",
        ),
        (["precompute", "CONFIG", "model.checkpoint=~/blip"], 1, "/blip (model.checkpoint): no such folder"),
        (["precompute", "CONFIG", "model.checkpoint=Embeded"], 1, "did you mean embedded?"),
        (
            ["precompute", "CONFIG", "data.train.images=/no/such/folder"],
            1,
            "/no/such/folder (data.train.images): no such",
        ),
        (["precompute", "CONFIG", "cache.dir=README.md"], 1, "README.md: not a folder"),
        (["precompute", "CONFIG", "data.train.annotations=/no/such/file"], 1, "/no/such/file"),
        (["precompute", "CONFIG", "data.format=vqav2"], 1, "data.train.questions is not set"),
        (["precompute", "CONFIG", "data.format=vqa"], 2, "unknown data.format 'vqa'; did you mean vqav2"),
        (["precompute", "CONFIG", "cache.dir=/proc/nothing"], 1, "/proc/nothing"),
        (["evaluate", "/no/such/run"], 1, "/no/such/run: not a run folder"),
        (["report", "/no/such/run"], 1, "/no/such/run: not a run folder"),
    ],
)
def test_invalid_input_is_reported_in_a_few_lines_and_changes_nothing(
    data_set: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], status: int, message: str
) -> None:
    (data_set / "README.md").write_text("text")
    monkeypatch.chdir(data_set)
    (data_set / "images" / "0.png").unlink()
    before = sorted(data_set.rglob("*"))
    done = pipe(*[data_set / "config.yaml" if word == "CONFIG" else word for word in words])
    assert done.exit_code == status, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output
    messages = [line for line in done.stderr.splitlines() if "%|" not in line]
    assert len(messages) <= 4
    assert done.stdout == ""
    assert sorted(data_set.rglob("*")) == before


@pytest.mark.parametrize(
    "words",
    [("evaluate", "~/x"), ("train", "~/x"), ("report", "~/x"), ("ask", "~/x", "a.png", "what?"),
     ("export", "~/x", "out"), ("cache", "info", "~/x"), ("cache", "rm", "~/x", "--yes"), ("cache", "ls", "~/x"),
     ("precompute", "~/x")],
)  # fmt: skip
def test_tilde_is_the_home_directory_in_every_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    done = pipe(*words)
    assert done.exit_code > 0
    assert f"{tmp_path}/x" in done.stderr


def test_ascii_locale_is_named(data_set: Path) -> None:
    (data_set / "images").rename(data_set / "gr\xfcn")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = "from pipeline.cli import main; main()"
    for key, status in (("images", 2), ("annotations", 2)):
        words = [sys.executable, "-c", code, "precompute", str(data_set / "config.yaml")]
        config = json.loads((data_set / "config.yaml").read_text())
        config["data"]["train"][key] = str(data_set / "gr\xfcn")
        (data_set / "config.yaml").write_text(json.dumps(config))
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        assert f"data.train.{key}: '{data_set}/gr\\xfcn': the encoding of this locale, ascii, cannot " in done.stderr
        assert "export LC_ALL=C.UTF-8, or PYTHONUTF8=1" in done.stderr
        assert "Traceback" not in done.stderr


def test_image_folder_whose_name_is_not_utf_8_is_read(data_set: Path) -> None:
    images = data_set / os.fsdecode(b"gr\xfcn")
    try:
        (data_set / "images").rename(images)
    except OSError:
        pytest.skip("the file system accepts only UTF-8 names")
    words = [f"data.{split}.images={images}" for split in ("train", "val")]
    for command in ("precompute", "train"):
        done = pipe(command, data_set / "config.yaml", *words)
        assert done.exit_code == 0, done.stderr


def test_missing_easy_vqa_package_is_reported(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.formats.easy_vqa.find_spec", lambda name: None)
    done = pipe("precompute", data_set / "config.yaml", "data={format: easy_vqa, train: {}}")
    assert done.exit_code == 1
    assert "pip install easy-vqa" in done.stderr


def test_debug_raises_the_error(data_set: Path) -> None:
    done = pipe("train", data_set / "config.yaml", "--debug")
    assert "no cache at" in str(done.exception)


def test_json_is_one_object_on_stdout_and_progress_goes_to_stderr(data_set: Path) -> None:
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


def test_summary_is_printed_as_a_table_without_json(data_set: Path) -> None:
    done = pipe("precompute", data_set / "config.yaml")
    assert done.exit_code == 0
    assert any(line.split() == ["encoded", "24"] for line in done.stdout.splitlines())
    assert "skipped" not in done.stdout
    verified = pipe("cache", "verify", data_set / "cache").stdout
    assert any(line.split() == ["damaged", "0"] for line in verified.splitlines())


def test_table_has_units_and_separates_names_from_values() -> None:
    summary = {
        "skipped": {"caption of an unlisted image": 2, "no annotation in my_file.json": 1},
        "nothing": {},
        "time": {"encoding": 0.00087},
        "bytes": 134544,
        "bytes_needed": 134544,
        "seconds": 1.4e-05,
        "images_per_second": 254.1234,
        "questions": 38575,
        "train_loss": 0.00123,
    }
    assert format_table(summary).splitlines() == [
        "skipped",
        "  caption of an unlisted image  2",
        "  no annotation in my_file.json  1",
        "time",
        "  encoding                  0.0 s",
        "bytes                       0.1 MiB",
        "bytes needed                0.1 MiB",
        "seconds                     0.0 s",
        "images per second           254.12",
        "questions                   38,575",
        "train loss                  0.0012",
    ]


def test_only_the_note_on_an_optional_kernel_of_bitsandbytes_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    silence_optional_kernel_warning()
    from bitsandbytes.backends.cpu import ops

    text = Path(ops.__file__).read_text()
    assert "Failed to load CPU gemm_4bit_forward from kernels-community: %s" in text
    ops.logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "x")
    ops.logger.warning("something else")
    assert [record.message for record in caplog.records] == ["something else"]


def test_installed_command_runs_in_any_folder(cached: Config, tmp_path: Path) -> None:
    config = write_config(tmp_path, cache={"dir": str(cached.cache.dir)}, train={"output_dir": "my runs"})
    command = [str(Path(sys.executable).with_name("pipe")), "train", str(config), "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert json.loads(done.stdout)["run"] == "my runs/config-1"
    assert (tmp_path / "my runs" / "config-1" / "adapter" / "adapter_model.safetensors").is_file()
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr


def test_cache_commands_list_describe_verify_repair_and_remove(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, cache = data_set / "config.yaml", data_set / "cache"
    assert pipe("precompute", config).exit_code == 0
    (listed,) = json.loads(pipe("cache", "ls", data_set, "--json").stdout)["caches"]
    assert (listed["cache"], listed["state"], listed["images"], listed["questions"]) == (str(cache), "finished", 24, 72)
    for named in (cache, config):
        described = json.loads(pipe("cache", "info", named, "--json").stdout)
        assert (described["images"], described["spec"]["dtype"], described["checkpoint"]["checkpoint"]) == (
            24,
            "float32",
            "embedded",
        )
    verified = json.loads(pipe("cache", "verify", cache, "--reencode", 5, "--json").stdout)
    assert (verified["damaged"], verified["reencoded"], verified["not_compared"]) == ([], 5, 0)
    assert verified["largest_difference"] < 1e-4

    flip_last_bit(cache / "features-00000.h5")
    damaged = pipe("cache", "verify", cache, "--json")
    assert damaged.exit_code == 1
    assert json.loads(damaged.stdout)["damaged"] == ["features-00000.h5: row 23 is damaged (CRC-32 mismatch)"]
    assert "pipe cache repair" in damaged.stderr
    repaired = json.loads(pipe("cache", "repair", cache, "--json").stdout)
    assert (repaired["encoded"], repaired["reused"]) == (1, 23)
    assert pipe("cache", "verify", cache).exit_code == 0

    (cache / "notes.txt").write_text("text")
    for answer in ("n\n", ""):
        refused = CliRunner().invoke(main, ["cache", "rm", str(cache)], input=answer)
        assert refused.exit_code == 1
        assert f"pipe: {cache}: not deleted. Use --yes to delete it without confirmation" in refused.stderr
        assert "Abort" not in refused.output
    removed = json.loads(pipe("cache", "rm", cache, "--yes", "--json").stdout)
    assert (removed["other_files"], sorted(path.name for path in cache.iterdir())) == (["notes.txt"], ["notes.txt"])
    assert pipe("cache", "rm", cache, "--yes").exit_code == 1


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_damaged_text_is_repaired_and_a_damaged_manifest_is_reported(data_set: Path) -> None:
    config, cache = data_set / "config.yaml", data_set / "cache"
    pipe("precompute", config)
    flip_last_bit(next(cache.glob("text-train-*.h5")))
    assert pipe("train", config).exit_code == 1
    repaired = json.loads(pipe("cache", "repair", config, "--json").stdout)
    assert (len(repaired["repaired"]), repaired["encoded"]) == (1, 0)
    assert pipe("cache", "verify", cache).exit_code == 0
    manifest = cache / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"rows": 24', '"rows": 25', 1))
    for command in (["cache", "verify", cache], ["cache", "repair", cache], ["train", config]):
        done = pipe(*command)
        assert done.exit_code == 1
        assert "Delete this one file and run `pipe precompute` again; the features are k" in done.stderr
    manifest.unlink()
    again = json.loads(pipe("precompute", config, "--json").stdout)
    assert (again["encoded"], again["reused"]) == (0, 24)


def test_dry_run_writes_no_list_of_skipped_questions(data_set: Path) -> None:
    (data_set / "images" / "0.png").unlink()
    before = sorted(data_set.rglob("*"))
    refused = pipe("precompute", data_set / "config.yaml", "--dry-run")
    assert (refused.exit_code, "skipped.jsonl" in refused.stderr) == (1, False)
    assert "Invalid questions: 3 questions (not found: " in refused.stderr
    estimate = pipe("precompute", data_set / "config.yaml", "precompute.on_invalid=skip", "--dry-run", "--json")
    assert json.loads(estimate.stdout)["skipped"] == {"not found": 3}
    assert "24 images, 1 of them invalid, 23 distinct" in estimate.stderr
    assert sorted(data_set.rglob("*")) == before


def test_dry_run_ignores_images_that_fail_to_decode(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = data_set / "images" / "5.png"
    broken.write_bytes(broken.read_bytes()[:-200])
    dry_run = ("precompute", data_set / "config.yaml", "--dry-run", "--json")
    assert json.loads(pipe(*dry_run).stdout)["images_per_second"] > 0
    monkeypatch.setattr("pipeline.encoding.encoding_loop.read_image_bytes", lambda path: b"")
    assert json.loads(pipe(*dry_run).stdout)["images_per_second"] is None


def test_dry_run_estimates_the_work_and_writes_nothing(data_set: Path) -> None:
    before = sorted(data_set.rglob("*"))
    done = pipe("precompute", data_set / "config.yaml", "--dry-run", "--json")
    estimate = json.loads(done.stdout)
    assert (estimate["images_found"], estimate["images"], estimate["to_encode"], estimate["reused"]) == (24, 24, 24, 0)
    assert estimate["bytes_needed"] >= 24 * 16 * 128 * 4
    assert estimate["images_per_second"] > 0
    assert "24 to encode" in done.stderr
    assert sorted(data_set.rglob("*")) == before
    pipe("precompute", data_set / "config.yaml")
    estimate = json.loads(pipe("precompute", data_set / "config.yaml", "--dry-run", "--json").stdout)
    assert (estimate["to_encode"], estimate["reused"], estimate["seconds_encoding"]) == (0, 24, 0)


def test_only_a_terminal_gets_colors(data_set: Path) -> None:
    words = [str(data_set / "no.yaml")]
    assert "\x1b" not in CliRunner().invoke(main, ["train", *words]).stderr
    assert "\x1b[31m" in CliRunner().invoke(main, ["train", *words], color=True).stderr
    lines = colorize("encoded                     24\ntime\n  encoding                  0.1 s")
    assert [line.startswith("\x1b") for line in lines.splitlines()] == [True] * 3
    assert unstyle(lines).splitlines()[2] == "  encoding                  0.1 s"
