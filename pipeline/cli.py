"""The `pipe` command: arguments and options of every subcommand. Stages are imported when a command runs."""

import re
import sys
from pathlib import Path

import click

from pipeline.cli_cache import cache
from pipeline.cli_runner import DEBUG, JSON, PATH, prints_result, run_command
from pipeline.common.libraries import hide_transformers_progress
from pipeline.common.result import Result
from pipeline.common.terminal import expand_home

CONFIG = click.argument("config", type=PATH)
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
RUN = click.argument("run", type=PATH)
ADAPTER = click.option(
    "--adapter",
    type=click.Choice(["trained", "none"]),
    default="trained",
    show_default=True,
    help="none: without LoRA.",
)
PRESET = click.option("--preset", type=click.Choice(["greedy", "official"]), help="official: as the BLIP-2 paper.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="blip2-vqa-pipeline")
def main() -> None:
    """Fine-tune BLIP-2 for visual question answering with LoRA on cached features.

    \b
    Try it offline:        pipe quickstart
    With your own config:  pipe precompute CONFIG; pipe train CONFIG; pipe evaluate RUN

    Exit status: 0 success, 1 failure, 2 invalid usage or config.
    """


@main.command()
@OVERRIDES
@prints_result
def quickstart(overrides: tuple[str, ...]) -> Result | None:
    """Run all stages on a small dataset, offline.

    Uses the small BLIP-2 and the easy-VQA dataset that come with the package (5,000 images, 48,248 questions).
    Writes caches/easy_vqa and runs/easy_vqa-N. By default it trains one epoch with 64 questions per step, r=16 and
    seed 0.

    \b
    Example:  pipe quickstart
              pipe quickstart train.seed=1
    """
    _quiet_libraries()
    from pipeline.commands.quickstart import quickstart

    return quickstart(overrides)


@main.command()
@CONFIG
@OVERRIDES
@click.option("--dry-run", is_flag=True, help="Print the number of images, the time and the disk space, and stop.")
@prints_result
def precompute(config: Path, overrides: tuple[str, ...], dry_run: bool) -> Result | None:
    """Encode the images of CONFIG into the feature cache.

    Images that the cache, or another cache beside it, already contains are not encoded again, so an interrupted command
    resumes when it is rerun. By default 64 images per batch, features in float16. To use several GPUs or machines,
    start it with torchrun or accelerate launch.

    \b
    Example:  pipe precompute configs/easy_vqa.yaml
              pipe precompute configs/your_data.yaml cache.dir=/data/caches/mine --dry-run
              torchrun --nproc-per-node 4 --no-python pipe precompute configs/your_data.yaml
    """
    hide_transformers_progress()
    from pipeline.commands.precompute import estimate_precompute, precompute
    from pipeline.config import load_config

    loaded = load_config(config, overrides)
    return estimate_precompute(loaded) if dry_run else precompute(loaded)


@main.command()
@CONFIG
@OVERRIDES
@click.option("--name", help="Name of the run folder. Default: name of CONFIG with a number.")
@click.option("--resume", is_flag=True, help="Resume the run given as CONFIG or --name.")
@click.option("--dry-run", is_flag=True, help="Print the number of steps and the memory, and stop.")
@prints_result
def train(config: Path, overrides: tuple[str, ...], name: str | None, resume: bool, dry_run: bool) -> Result | None:
    """Train a LoRA adapter from the feature cache.

    The run folder is created in train.output_dir. By default 3 epochs of 64 questions per step, r=16, alpha=32,
    learning rate 2e-4 with cosine decay. An override with several values, as lora.r=8,16, trains one run per
    combination. To use several GPUs or machines, start it with torchrun or accelerate launch.

    \b
    Example:  pipe train configs/easy_vqa.yaml
              pipe train configs/easy_vqa.yaml lora.r=32 --name wide
              pipe train configs/easy_vqa.yaml lora.r=8,16 train.learning_rate=1e-3,3e-3
              pipe train runs/wide --resume
    """
    _quiet_libraries()
    from pipeline.config import Config
    from pipeline.overrides import combinations_of

    if len(combinations_of(overrides, Config)[0]) > 1:
        from pipeline.commands.grid import train_grid

        if dry_run:
            raise click.UsageError("--dry-run estimates a single run: give each key one value")
        return train_grid(config, overrides, name, resume)
    from pipeline.commands.train import resolve_run, train_run
    from pipeline.training.estimate import estimate_training

    loaded, run = resolve_run(config, overrides, name, resume)
    return estimate_training(loaded) if dry_run else train_run(loaded, run, resume)


@main.command()
@RUN
@OVERRIDES
@click.option("--split", help="Same as evaluate.split=...: train, val or test.")
@ADAPTER
@PRESET
@click.option("--num-beams", help="Same as evaluate.num_beams=...")
@click.option("--metric", help="Same as evaluate.metric=...")
@prints_result
def evaluate(
    run: Path,
    overrides: tuple[str, ...],
    split: str | None,
    adapter: str,
    preset: str | None,
    num_beams: str | None,
    metric: str | None,
) -> Result | None:
    """Answer the questions of a split, and compute the accuracy.

    By default with the split, beams and metric of RUN's config. Writes to RUN: results-SPLIT.json in the submission
    format of the dataset, evaluation-SPLIT.json with the summary, predictions-SPLIT.jsonl, and mistakes-SPLIT.jsonl
    with the most confident mistakes. With --adapter none, SPLIT is SPLIT-no-adapter.

    \b
    Example:  pipe evaluate runs/easy_vqa-1
              pipe evaluate runs/easy_vqa-1 --preset official --adapter none
    """
    _quiet_libraries()
    from pipeline.commands.evaluate import evaluate

    options = {"split": split, "num_beams": num_beams, "metric": metric}
    given = [f"evaluate.{key}={value}" for key, value in options.items() if value is not None]
    return evaluate(run, (*_preset_overrides(preset), *given, *overrides), adapter == "trained")


@main.command()
@RUN
@click.argument("words", nargs=-1, metavar="[IMAGE [QUESTION]] [KEY=VALUE]...")
@ADAPTER
@PRESET
@JSON
@DEBUG
def ask(run: Path, words: tuple[str, ...], adapter: str, preset: str | None, as_json: bool, debug: bool) -> None:
    """Answer a question about an image file.

    Without QUESTION, reads questions line by line, until an empty line or Ctrl-D; a line with the path of an image
    switches to that image. If stdin is a pipe, each line of input gives one line on stdout: the answer, or an empty
    line if there is none. By default it decodes with the settings of RUN's config.

    \b
    Example:  pipe ask runs/easy_vqa-1 image.png "what shape is in the image?"
              pipe ask runs/easy_vqa-1
              pipe ask runs/easy_vqa-1 image.png < questions.txt > answers.txt
    """
    image, question, overrides = _split_words(words)
    output = sys.stdout  # run_command prints everything else on stderr

    def answer() -> Result | None:
        _quiet_libraries()
        from pipeline.commands.ask import ask

        return ask(
            run, image, question, (*_preset_overrides(preset), *overrides), adapter == "trained", as_json, output
        )

    run_command(answer, as_json, debug)


@main.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=PATH)
@click.option("--output", type=PATH, help="HTML file. Default: report.html, in RUN if there is one.")
@click.option(
    "--max-examples", type=click.IntRange(min=0), default=200, show_default=True, metavar="N", help="Questions to show."
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of the selection of questions.")
@prints_result
def report(runs: tuple[Path, ...], output: Path | None, max_examples: int, seed: int) -> Result | None:
    """Write an HTML report on one run, or a comparison of several.

    The file needs no other file and no network. For one RUN it shows the summary, the curves, the LoRA updates per
    layer, the accuracy per type, and questions with their images, references and predictions, by default 200. For
    several runs, it compares their configs, results and curves.

    \b
    Example:  pipe report runs/easy_vqa-1
              pipe report runs/* --output comparison.html
    """
    from pipeline.commands.report import report

    return report(runs, output, max_examples, seed)


@main.command()
@RUN
@click.argument("destination", metavar="DEST", type=PATH)
@OVERRIDES
@click.option("--merge", is_flag=True, help="Merge the adapter into the full model, in float16.")
@click.option("--push", metavar="REPO", help="Also upload it to a Hugging Face Hub repository.")
@prints_result
def export(run: Path, destination: Path, overrides: tuple[str, ...], merge: bool, push: str | None) -> Result | None:
    """Export the adapter of RUN, or a merged model.

    Writes the new folder DEST. By default it contains the PEFT adapter. With --merge it contains a full BLIP-2 model
    that transformers loads without PEFT or bitsandbytes; the summary compares its predictions and logits with those of
    RUN on up to 100 questions. A repository that --push creates is private.

    \b
    Example:  pipe export runs/easy_vqa-1 adapters/easy_vqa
              pipe export runs/easy_vqa-1 models/easy_vqa --merge --push me/blip2-easy-vqa
    """
    _quiet_libraries()
    from pipeline.commands.export import export

    return export(run, destination, overrides, merge, push)


@main.command()
@click.option("--size", type=click.Choice(["tiny", "blip2-opt-2.7b", "blip2-opt-6.7b"]), default="blip2-opt-2.7b",
              metavar="SIZE", help="tiny, blip2-opt-2.7b or blip2-opt-6.7b.")  # fmt: skip
@click.option(
    "--questions", type=click.IntRange(1), default=32, show_default=True, metavar="N", help="Questions per step."
)
@click.option(
    "--turns", type=click.IntRange(1), default=3, show_default=True, metavar="N", help="Measured steps of each method."
)
@click.option("--folder", type=PATH, help="Keep the random weights in this folder.")
@click.option("--plot", type=PATH, help="Draw the questions per second to this SVG file.")
@prints_result
def benchmark(size: str, questions: int, turns: int, folder: Path | None, plot: Path | None) -> Result | None:
    """Compare the training speed with the plain recipe.

    Needs no download: the weights are random, and the questions follow the distribution of VQAv2. Alternates steps of
    the plain recipe (the full model in 4 bits, one question per sequence), of this pipeline without shared prefixes,
    and of this pipeline. By default 3 steps of 32 questions at the size of blip2-opt-2.7b: 7.5 GB on disk, and about
    ten minutes on a CPU.

    \b
    Example:  pipe benchmark
              pipe benchmark --size tiny --turns 10 --plot benchmark.svg
    """
    _quiet_libraries()
    from pipeline.commands.benchmark import benchmark, draw
    from pipeline.common.files import require_writable

    if plot:
        require_writable(plot.parent)
    result = benchmark(size, questions, turns, folder)
    if plot:
        draw(result, plot)
    return result


main.add_command(cache)


def _quiet_libraries() -> None:
    """Keep the libraries of the language model from printing what no user needs."""
    from pipeline.common.compat import silence_optional_kernel_warning

    silence_optional_kernel_warning()
    hide_transformers_progress()


def _preset_overrides(preset: str | None) -> list[str]:
    """Return the overrides that a --preset stands for."""
    from pipeline.config import PRESETS

    return [f"evaluate.{key}={value}" for key, value in PRESETS[preset].items()] if preset else []


def _split_words(words: tuple[str, ...]) -> tuple[Path | None, str | None, list[str]]:
    """Split the arguments of `ask` into image, question and overrides."""
    overrides = [word for word in words if re.match(r"\w+\.[\w.]+=", word)]
    image_and_question = [word for word in words if word not in overrides]
    if len(image_and_question) > 2:
        raise click.UsageError(f"more than IMAGE and QUESTION: {image_and_question[2]!r}. Put the question in quotes")
    image, question = (*image_and_question, None, None)[:2]
    return expand_home(image) if image else None, question, overrides
