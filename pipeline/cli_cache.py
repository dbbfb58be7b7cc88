"""The commands of `pipe cache`."""

import sys
from pathlib import Path

import click

from pipeline.cli_runner import PATH, prints_result
from pipeline.common.libraries import hide_transformers_progress
from pipeline.common.result import Result

CACHE = click.argument("folder", metavar="CACHE", type=PATH)


@click.group()
def cache() -> None:
    """List, verify, repair or delete caches.

    CACHE is the folder of a cache, or a config that names it.
    """


@cache.command("ls")
@click.argument("root", type=PATH, default="caches")
@prints_result
def cache_ls(root: Path) -> Result | None:
    """List the caches in ROOT and its subfolders, by default in ./caches.

    \b
    Example:  pipe cache ls
              pipe cache ls /data
    """
    from pipeline.commands.cache import list_caches

    return list_caches(root)


@cache.command("info")
@CACHE
@prints_result
def cache_info(folder: Path) -> Result | None:
    """Print what a cache contains and how it was made. By default only its manifest is read.

    \b
    Example:  pipe cache info caches/easy_vqa
    """
    from pipeline.commands.cache import cache_info

    return cache_info(folder)


@cache.command("verify")
@CACHE
@click.option("--reencode", type=click.IntRange(min=0), default=0, metavar="N",
              help="Encode N random images again, and compare.")  # fmt: skip
@prints_result
def cache_verify(folder: Path, reencode: int) -> Result | None:
    """Compare a cache with its checksums. Exit status 1 if it is damaged.

    By default this needs no images. --reencode needs the images and the encoder.

    \b
    Example:  pipe cache verify caches/easy_vqa
              pipe cache verify caches/easy_vqa --reencode 20
    """
    if reencode:
        hide_transformers_progress()
    from pipeline.commands.cache import verify_cache

    return verify_cache(folder, reencode)


@cache.command("repair")
@CACHE
@prints_result
def cache_repair(folder: Path) -> Result | None:
    """Encode the damaged rows of a cache again.

    By default with the config that the cache was made with, and its paths as they were then.

    \b
    Example:  pipe cache repair caches/easy_vqa
              pipe cache repair configs/your_data.yaml
    """
    hide_transformers_progress()
    from pipeline.commands.repair import repair

    return repair(folder)


@cache.command("rm")
@CACHE
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@prints_result
def cache_rm(folder: Path, yes: bool) -> Result | None:
    """Delete a cache. By default it asks for confirmation. Other files in the folder are kept.

    \b
    Example:  pipe cache rm caches/easy_vqa
    """
    from pipeline.commands.cache import cache_folder, remove_cache
    from pipeline.common.errors import PipelineError

    found = cache_folder(folder)
    if not yes and not _is_confirmed(f"Delete the cache {found}?"):
        advice = "" if sys.stdin.isatty() else ". Use --yes to delete it without confirmation"
        raise PipelineError(f"{found}: not deleted{advice}")
    return remove_cache(found)


def _is_confirmed(question: str) -> bool:
    try:
        return click.confirm(question, err=True)
    except click.Abort:  # end of input
        click.echo(err=True)
        return False
