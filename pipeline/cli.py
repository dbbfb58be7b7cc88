"""The command: words in, one call, a summary out. What the stages do is imported when it is asked for."""

import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.common.terminal import from_home, locale_problem, print_error, show, show_every_character

if TYPE_CHECKING:
    from pipeline.answers.predictor import Prediction
    from pipeline.commands.evaluate import EvaluateResult
    from pipeline.commands.export import ExportResult
    from pipeline.commands.report import ReportResult
    from pipeline.common.result import Result


class UserPath(click.Path):
    """A path in which ~ stands for a home folder, also where no shell has replaced it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return from_home(os.fsdecode(super().convert(value, param, ctx)))


PATH = UserPath()
CONFIG = click.argument("config", type=PATH)
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
RUN = click.argument("run", type=PATH)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="blip2-vqa-pipeline")
def main() -> None:
    """Fine-tune BLIP-2 for visual question answering with LoRA, from cached query features.

    \b
    Try it, offline, in minutes:   pipe quickstart
    With your own config:          pipe precompute CONFIG
                                   pipe train CONFIG
                                   pipe evaluate RUN

    Exit status: 0 done; 1 failed, with what, where and what to do next; 2 wrong usage or config.
    """


def stage(command: "Callable[..., Result | dict[str, Any] | None]") -> Callable[..., None]:
    """A command that returns a summary, with --json and --debug, and errors told in a line or two."""

    @click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object, nothing else.")
    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @wraps(command)
    @_ending_process()
    def run(as_json: bool, debug: bool, **arguments: Any) -> None:
        started = time.perf_counter()
        show_every_character()
        click.get_current_context().obj = sys.stdout  # where a conversation's answers go
        with redirect_stdout(sys.stderr):  # stdout carries the summary alone
            result = _guarded(lambda: command(**arguments), debug)
        if result is None:
            return  # all is told: by the first of several processes, or in a conversation
        summary = result if isinstance(result, dict) else result.to_dict()
        summary["seconds"] = time.perf_counter() - started  # the loading of the libraries included
        click.echo(json.dumps(summary)) if as_json else show(summary)
        if summary.get("damaged") or summary.get("failed_runs"):
            sys.exit(1)

    return run


@contextmanager
def _ending_process() -> Iterator[None]:
    """`ending_process`, imported when a command runs."""
    from pipeline.common.distributed import ending_process

    with ending_process():
        yield


def _guarded(call: "Callable[[], Result | dict[str, Any] | None]", debug: bool) -> "Result | dict[str, Any] | None":
    from pipeline.common.distributed import local_rank
    from pipeline.common.errors import ConfigError

    speaks = local_rank() == 0  # of what all processes of a machine meet alike
    try:
        # The libraries' notes to developers; other warnings stay.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        return call()
    except (click.ClickException, BrokenPipeError):
        raise  # click prints the one; of the other, that who reads stdout has seen enough, it says nothing
    except (Exception, KeyboardInterrupt) as error:
        if debug and isinstance(error, Exception):
            raise
        if isinstance(error, KeyboardInterrupt) and speaks:
            click.echo(err=True)
        if speaks or not isinstance(error, ConfigError | KeyboardInterrupt):
            print_error(_in_words(error))
        sys.exit(2 if isinstance(error, ConfigError) else 1)


def _in_words(error: BaseException) -> str:
    from cache.spec import CacheError
    from pipeline.common.errors import PipelineError
    from pipeline.common.files import disk_problem

    if isinstance(error, PipelineError | CacheError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; what is written stays good. The same command goes on; a training: pipe train RUN --resume"
    if isinstance(error, UnicodeEncodeError):
        return locale_problem(error.object) or f"{error.object!a}: not a text that {error.encoding} can hold"
    if problem := disk_problem(error):
        return problem
    if isinstance(error, OSError):
        return str(error)
    from pipeline.blip2.memory import is_out_of_memory

    first_line = (str(error).strip() or "no message").splitlines()[0]  # what a library raises deep inside
    hint = "; try a smaller batch (train.micro_batch, *.batch_size)" if is_out_of_memory(error) else ""
    return f"{type(error).__name__}: {first_line}{hint}. --debug shows where"


def _quiet_transformers() -> None:
    """Keep its progress bars out of ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _load_bitsandbytes() -> None:
    """Import it without `torch.compile`, a quarter of the time that the command takes to start.

    At its import it compiles two functions that neither the CPU nor CUDA uses; where that fails, it keeps
    them as they are, but the attempt loads all of torch's compiler.
    """
    from unittest.mock import patch

    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)
    with patch("torch.compile", side_effect=RuntimeError):
        import bitsandbytes  # noqa: F401
    _quiet_transformers()


def _is_news(record: logging.LogRecord) -> bool:
    """Not that an optional kernel for the CPU is missing: without it the weights are dequantised, as they should be."""
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward from kernels-community")


@main.command()
@OVERRIDES
@stage
def quickstart(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Run the whole job on what is inside the package: precompute, train, evaluate before and after.

    The small BLIP-2 of this package on the data set easy-VQA (5,000 pictures, 48,248 questions), no network.
    The cache goes to caches/easy_vqa, the run to runs/easy_vqa-N, both below the folder you are in. By
    default one epoch of 64 questions a step, r=16, seed 0; every key of its config can be overridden.

    \b
    Example:  pipe quickstart
              pipe quickstart train.seed=1
    """
    _load_bitsandbytes()
    from pipeline.commands.quickstart import quickstart

    return quickstart(overrides)


@main.command()
@CONFIG
@OVERRIDES
@click.option("--dry-run", is_flag=True, help="Say what there is to do, how long it takes, and whether it fits.")
@stage
def precompute(config: Path, overrides: tuple[str, ...], dry_run: bool) -> dict[str, Any] | None:
    """Stage one: run the frozen encoder once over the pictures that CONFIG names, into its cache.

    A killed or repeated run goes on where the last one stopped; only pictures that neither the cache nor one
    beside it has are encoded. By default 64 pictures at a time, features in float16. Several GPUs or
    machines: start it with torchrun or accelerate launch.

    \b
    Example:  pipe precompute configs/easy_vqa.yaml
              pipe precompute configs/your_data.yaml cache.dir=/data/caches/mine --dry-run
              torchrun --nproc-per-node 4 --no-python pipe precompute configs/your_data.yaml
    """
    from pipeline.commands import precompute as stage_one
    from pipeline.config import load_config

    _quiet_transformers()
    loaded = load_config(config, overrides)
    return stage_one.dry_run(loaded) if dry_run else stage_one.precompute(loaded)


@main.command()
@CONFIG
@OVERRIDES
@click.option("--name", help="Of the run folder below train.output_dir; default: the config's name and a number.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint: of the run's folder, given as CONFIG, or "
              "of the run --name.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say how many steps it takes, and how much memory; begin nothing.")
@stage
def train(
    config: Path, overrides: tuple[str, ...], name: str | None, resume: bool, dry_run: bool
) -> dict[str, Any] | None:
    """Stage two: train LoRA on the 4-bit language model, from the cache alone, into a run folder.

    Overrides that list several values, lora.r=8,16, train every combination, each into a folder of its own.

    By default 3 epochs of 64 questions a step, r=16, alpha=32, learning rate 2e-4 with cosine decay. Several GPUs
    or machines: start it with torchrun or accelerate launch.

    \b
    Example:  pipe train configs/easy_vqa.yaml
              pipe train configs/easy_vqa.yaml lora.r=32 --name wide
              pipe train configs/easy_vqa.yaml lora.r=8,16 train.learning_rate=1e-3,3e-3 --name grid
              pipe train runs/wide --resume
    """
    from pipeline.config import combinations_of, load_config
    from pipeline.runs.run import Run, named_run, next_run

    combinations, fixed = combinations_of(overrides)
    is_grid = len(combinations) > 1
    if is_grid and dry_run:
        raise click.UsageError("--dry-run foretells one training: give each key one value")
    if resume and not name and (is_grid or not config.is_dir()):
        raise click.UsageError("--resume goes on with a run: give its folder in place of CONFIG, or its --name")
    resumed = Run(config) if resume and not name else None
    loaded = load_config(resumed.config if resumed else config, fixed)
    folder = loaded.train.output_dir
    run = resumed or (named_run(folder, name) if name else next_run(folder, config.stem))
    _load_bitsandbytes()
    if is_grid:
        from pipeline.commands.grid import train_grid

        return train_grid(config, combinations, fixed, run, resume)
    if dry_run:
        from pipeline.training.estimate import estimate_training

        return estimate_training(loaded)
    from pipeline.commands.train import train

    return train(loaded, run, resume)


ADAPTER = click.option(
    "--adapter",
    type=click.Choice(["trained", "none"]),
    default="trained",
    show_default=True,
    help="none: the model as it was before training.",
)
PRESET = click.option(
    "--preset",
    type=click.Choice(["greedy", "official"]),
    help="greedy: fast. official: 5 beams, 1 to 10 new tokens, length penalty -1, as the BLIP-2 paper.",
)


@main.command()
@RUN
@OVERRIDES
@click.option("--split", help="train, val or test; the same as evaluate.split=...")
@ADAPTER
@PRESET
@click.option("--num-beams", help="The same as evaluate.num_beams=...")
@click.option("--metric", help="How answers are counted; the same as evaluate.metric=...")
@stage
def evaluate(
    run: Path, overrides: tuple[str, ...], split: str | None, adapter: str, preset: str | None, num_beams: str | None,
    metric: str | None,
) -> "EvaluateResult":  # fmt: skip
    """Answer the questions of a split from the cache, and score the answers.

    By default the split, beams and metric that RUN's config names. Writes into RUN, for each split, the answers in the
    data set's official form (results-SPLIT.json, ready to upload), the summary (evaluation-SPLIT.json) and the surest
    mistakes (mistakes-SPLIT.jsonl); with --adapter none they are called SPLIT-no-adapter.

    \b
    Example:  pipe evaluate runs/easy_vqa-1
              pipe evaluate runs/easy_vqa-1 --preset official --adapter none
    """
    _load_bitsandbytes()
    from pipeline.commands.evaluate import evaluate
    from pipeline.config import PRESETS

    named = {"split": split, "num_beams": num_beams, "metric": metric}
    given = PRESETS.get(preset or "", {}) | {key: value for key, value in named.items() if value is not None}
    options = [f"evaluate.{key}={value}" for key, value in given.items()]
    return evaluate(run, (*options, *overrides), adapter == "trained")


@main.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=PATH)
@click.option("--output", type=PATH, help="The page; default: report.html in RUN, or here.")
@click.option(
    "--max-examples", type=click.IntRange(min=0), default=200, show_default=True, help="Questions shown, at most."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of their choice.")
@stage
def report(runs: tuple[Path, ...], output: Path | None, max_examples: int, seed: int) -> "ReportResult":
    """Write a page on a run, or on several side by side: one HTML file that needs no other and no network.

    Of one RUN: what came out, curves, LoRA layer by layer, accuracy by type, and questions with their pictures,
    people's answers and the model's, before and after LoRA where it was evaluated with --adapter none too. By default
    200 questions: mistakes, those that LoRA broke or fixed, and others. Of several: what differs in their configs and
    what came out, in a table, and their curves in one. The pictures are the cache's thumbnails.

    \b
    Example:  pipe report runs/easy_vqa-1
              pipe report runs/* --output compared.html
    """
    from pipeline.commands.report import report

    return report(runs, output, max_examples, seed)


@main.command()
@RUN
@click.argument("words", nargs=-1, metavar="[IMAGE [QUESTION]] [KEY=VALUE]...")
@ADAPTER
@PRESET
@stage
def ask(run: Path, words: tuple[str, ...], adapter: str, preset: str | None) -> "Prediction | None":
    """Answer a question on any picture file with RUN's adapter: encodes it as stage one would.

    Without QUESTION, or without IMAGE, it asks for them, line by line, until an empty line or Ctrl-D; a line that is
    the path of a picture changes the picture. Answers go to stdout, all else to stderr. Each line of a pipe, whatever
    its bytes, gives one line: the answer, or an empty one (with --json an object). By default greedy, as the config
    says.

    \b
    Example:  pipe ask runs/easy_vqa-1 picture.png "what shape is in the image?"
              pipe ask runs/easy_vqa-1
              pipe ask runs/easy_vqa-1 picture.png < questions.txt > answers.txt
    """
    image, question, overrides = _image_and_question(words)
    _load_bitsandbytes()
    from pipeline.commands.ask import ask
    from pipeline.config import PRESETS

    options = [f"evaluate.{key}={value}" for key, value in PRESETS.get(preset or "", {}).items()]
    context = click.get_current_context()
    return ask(
        run, image, question, (*options, *overrides), adapter == "trained", context.params["as_json"], context.obj
    )


@main.command()
@RUN
@click.argument("destination", metavar="DEST", type=PATH)
@OVERRIDES
@click.option("--merge", is_flag=True, help="The full model in float16, with the adapter folded into its weights.")
@click.option("--push", metavar="REPO", help="Upload it to this repository of the Hugging Face hub, too; a new one "
              "is private.")  # fmt: skip
@stage
def export(run: Path, destination: Path, overrides: tuple[str, ...], merge: bool, push: str | None) -> "ExportResult":
    """Write RUN's adapter into the new folder DEST, by default as it is, for plain transformers + PEFT.

    With --merge a full BLIP-2 that plain transformers loads without PEFT or bitsandbytes; the summary says how far its
    logits are from the run's, and how many answers are equal, on up to 100 questions of evaluate.split.

    \b
    Example:  pipe export runs/easy_vqa-1 adapters/easy_vqa
              pipe export runs/easy_vqa-1 models/easy_vqa --merge --push me/blip2-easy-vqa
    """
    _load_bitsandbytes()
    from pipeline.commands.export import export

    return export(run, destination, overrides, merge, push)


def _image_and_question(words: tuple[str, ...]) -> tuple[str | None, str | None, list[str]]:
    """Tells them from overrides, which may be the only words there are."""
    overrides = [word for word in words if re.match(r"\w+\.[\w.]+=", word)]
    others = [word for word in words if word not in overrides]
    if len(others) > 2:
        raise click.UsageError(f"more than IMAGE and QUESTION: {others[2]!r}; a question is one word, in quotes")
    image, question = (*others, None, None)[:2]
    return image, question, overrides


@main.command()
@click.option("--size", type=click.Choice(["tiny", "blip2-opt-2.7b", "blip2-opt-6.7b"]), default="blip2-opt-2.7b",
              show_default=True, help="Of the model, which has random weights.")  # fmt: skip
@click.option("--questions", type=click.IntRange(1), default=32, show_default=True, help="A step, in one pass.")
@click.option(
    "--turns", type=click.IntRange(1), default=3, show_default=True, help="Steps of each way, after one more."
)
@click.option("--folder", type=PATH, help="Keep the random weights (7.5 GB at 2.7b) there.")
@click.option("--plot", type=PATH, help="Draw the questions a second into this SVG file.")
@stage
def benchmark(size: str, questions: int, turns: int, folder: Path | None, plot: Path | None) -> dict[str, Any]:
    """Measure on this machine what the pipeline brings, before anything is downloaded.

    Training steps on VQAv2's distribution of questions and lengths, in turns: the plain recipe (the full model, the
    language model in 4 bits, pictures, one question a sequence), stage two with one question a sequence, and stage two
    as it is. By default at the size of BLIP-2 OPT-2.7b, which on a CPU takes ten minutes.

    \b
    Example:  pipe benchmark
              pipe benchmark --size tiny --turns 10 --plot benchmark.svg
    """
    _load_bitsandbytes()
    from pipeline.commands.benchmark import benchmark, draw
    from pipeline.common.files import require_writable

    if plot:
        require_writable(plot.parent)
    summary = benchmark(size, questions, turns, folder)
    if plot:
        draw(summary, plot)
    return summary


CACHE = click.argument("folder", metavar="CACHE", type=PATH)


@main.group()
def cache() -> None:
    """Look after caches: ls, info, verify, repair, rm.

    CACHE is a cache's folder, or the config that names it.
    """


@cache.command("ls")
@click.argument("root", type=PATH, default="caches")
@stage
def cache_ls(root: Path) -> dict[str, Any]:
    """List the caches in the folder ROOT and below, by default in ./caches.

    \b
    Example:  pipe cache ls
              pipe cache ls /data
    """
    from pipeline.encoding.upkeep import list_caches

    return list_caches(root)


@cache.command("info")
@CACHE
@stage
def cache_info(folder: Path) -> dict[str, Any]:
    """Say what a cache holds and what it was made of; by default nothing but its manifest is read.

    \b
    Example:  pipe cache info caches/easy_vqa
    """
    from pipeline.encoding import upkeep

    return upkeep.cache_info(upkeep.cache_folder(folder))


@cache.command("verify")
@CACHE
@click.option("--reencode", type=click.IntRange(min=0), default=0, metavar="N",
              help="Also encode N random pictures again, and tell the largest difference.")  # fmt: skip
@stage
def cache_verify(folder: Path, reencode: int) -> dict[str, Any]:
    """Read all of a cache and compare it with its checksums; exit status 1 if anything is damaged.

    By default no picture is needed; --reencode needs them, and the encoder.

    \b
    Example:  pipe cache verify caches/easy_vqa
              pipe cache verify caches/easy_vqa --reencode 20
    """
    from pipeline.encoding import upkeep

    found = upkeep.cache_folder(folder)
    summary = upkeep.verify(found)
    if reencode and not summary["damaged"]:
        from pipeline.commands.repair import reencode as encode_again

        _quiet_transformers()
        summary |= encode_again(found, reencode)
    return summary


@cache.command("repair")
@CACHE
@stage
def cache_repair(folder: Path) -> dict[str, Any]:
    """Encode the damaged rows of a cache again, and only these.

    By default with the config that the cache was made with: pictures and annotations are looked for where they were
    then, whatever folder you are in.

    \b
    Example:  pipe cache repair caches/easy_vqa
              pipe cache repair configs/your_data.yaml
    """
    from pipeline.commands.repair import repair

    _quiet_transformers()
    return repair(folder)


@cache.command("rm")
@CACHE
@click.option("--yes", is_flag=True, help="Do not ask.")
@stage
def cache_rm(folder: Path, yes: bool) -> dict[str, Any]:
    """Delete a cache; by default it asks first, and other files in its folder are left alone.

    \b
    Example:  pipe cache rm caches/easy_vqa
    """
    from pipeline.common.errors import PipelineError
    from pipeline.encoding import upkeep

    found = upkeep.cache_folder(folder)
    if not yes and not _confirmed(f"Delete the cache {found}?"):
        raise PipelineError(f"{found}: not deleted" + ("" if sys.stdin.isatty() else "; --yes deletes without asking"))
    return upkeep.remove_cache(found)


def _confirmed(question: str) -> bool:
    try:
        return click.confirm(question, err=True)
    except click.Abort:  # no answer
        click.echo(err=True)
        return False
