"""Every command and Python block that the README and docs/ show is valid (fast), and runs (slow)."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import click
import pytest
import yaml
from data_set import write_config, write_data_set
from PIL import Image
from processes import pipe
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from pipeline.cli import main
from pipeline.config import Config
from pipeline.config_data import SplitFiles

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
MAX_README_LINES = 160
_BLOCK = re.compile(
    r"(?:<!--\s*not run:\s*(?P<reason>.*?)\s*-->\s*\n)?```(?P<language>\w+)\n(?P<code>.*?)^```", re.S | re.M
)
_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `reason` says why it is not run, if it is not."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, found.start("code")), found["language"], found["code"], found["reason"])
        for found in _BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def commands_of(block: Block) -> Iterator[list[str]]:
    """The words of each `pipe` command of a shell block, without redirections."""
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "pipe" not in words[:1]:
            continue
        end = next((place for place, word in enumerate(words) if word in ("<", ">", "|", "&&", "2>", ";")), len(words))
        yield words[1:end]


COMMANDS = [
    pytest.param(words, id=f"{block}-{number}")
    for block in BLOCKS
    if block.language in ("bash", "sh", "console")
    for number, words in enumerate(commands_of(block))
]


@pytest.mark.parametrize("words", COMMANDS)
def test_shown_commands_take_their_options_and_keys(words: list[str]) -> None:
    command: click.Command = main
    context = click.Context(main, info_name="pipe")
    while isinstance(command, click.Group):
        known = command.get_command(context, words[0])
        assert known is not None, f"no command {words[0]}"
        command, words = known, words[1:]
    if "--help" not in words:
        command.make_context("pipe", list(words))
    for word in words:
        if key := re.match(r"([a-z]+)\.([a-z_]+)(\.[a-z_]+)?=", word):
            section = Config.model_fields[key[1]].annotation
            assert section is not None
            assert key[2] in section.model_fields, word


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_shown_python_compiles(block: Block) -> None:
    compile(block.code, str(block), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    missing = [link for link in _LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing


def test_the_readme_fits_a_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def test_blocks_have_known_languages_and_reasons() -> None:
    assert {block.language for block in BLOCKS} <= {"bash", "python", "json", "yaml", "text", "csv"}
    assert all(block.reason != "" for block in BLOCKS)
    assert sum(block.reason is None for block in BLOCKS if block.language in ("bash", "python")) >= 20


def documented_defaults() -> dict[str, str]:
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \| ", (ROOT / "docs" / "configuration.md").read_text(), re.M)
    return {key: default.strip("`") for key, default in rows}


def defaults_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the keys of a section and their defaults as YAML."""
    for name, field in model.model_fields.items():
        sections = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        section = next((kind for kind in sections if issubclass(kind, BaseModel)), None)
        if section is None:
            default = field.get_default(call_default_factory=True, validated_data={})
            text = "required" if field.is_required() else yaml.safe_dump(to_jsonable_python(default)).strip()
            yield prefix + name, text.removesuffix("\n...")
        elif section is SplitFiles:
            yield prefix + name, "null"
            yield from defaults_of(section, f"{prefix}SPLIT.")
        else:
            yield from defaults_of(section, f"{prefix}{name}.")


def test_configuration_page_lists_every_key_with_its_default() -> None:
    documented = documented_defaults()
    expected = dict(defaults_of(Config))
    assert documented.keys() == expected.keys()
    assert {k: yaml.safe_load(v) for k, v in documented.items() if k != "data.prompt"} == {
        k: yaml.safe_load(v) for k, v in expected.items() if k != "data.prompt"
    }


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache of a small data set in the place of easy-VQA, and a short run, `runs/first`."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "configs", folder / "configs", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    write_data_set(folder / "data")
    files = {"images": f"{folder}/data/images", "annotations": f"{folder}/data/train.jsonl"}
    test_files = {**files, "annotations": f"{folder}/data/val.jsonl"}
    config = write_config(
        folder,
        data={"train": files, "val": None, "test": test_files},
        cache={"dir": "caches/easy_vqa"},
        train={"max_steps": 4, "output_dir": "runs"},
        evaluate={"split": "test"},
    )
    config.replace(folder / "configs" / "easy_vqa.yaml")
    Image.open(folder / "data" / "images" / "0.png").save(folder / "cat.jpg")
    (folder / "questions.txt").write_text("what shape is it?\nwhat color is it?\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert pipe(folder, "precompute", "configs/easy_vqa.yaml").status == 0
        assert pipe(folder, "train", "configs/easy_vqa.yaml", "--name", "first").status == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of_a_page_run_in_their_order(page: Path, job: Path, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    shutil.copytree(job, folder)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for block in blocks_of(page):
        if block.reason is not None or block.language not in ("bash", "python"):
            continue
        command = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
        done = subprocess.run(
            [*command, block.code], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{block}\n{block.code}\n{done.stdout}\n{done.stderr}"
