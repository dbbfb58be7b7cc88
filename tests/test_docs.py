"""Every command and Python block that the README and docs/ show is valid."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from pipeline.cli import main
from pipeline.config import Config

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
