"""Run a command: its output, errors and exit status, and the options --json and --debug."""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Any

import click

from pipeline.common.distributed import exit_without_group_teardown, local_rank
from pipeline.common.errors import ConfigError, PipelineError
from pipeline.common.result import Result
from pipeline.common.terminal import (
    escape_unencodable_characters,
    expand_home,
    locale_problem,
    print_error,
    print_summary,
)

Command = Callable[[], Result | None]


class UserPath(click.Path):
    """A path in which a leading ~ is expanded to the home directory, even if no shell does it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the expanded path."""
        return expand_home(os.fsdecode(super().convert(value, param, ctx)))


PATH = UserPath()
JSON = click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
DEBUG = click.option("--debug", is_flag=True, help="Show the traceback of an error.")


def prints_result(function: Callable[..., Result | None]) -> Callable[..., None]:
    """Decorate a command that returns a result: add --json and --debug, and print the result."""

    @JSON
    @DEBUG
    @wraps(function)
    def command(as_json: bool, debug: bool, **arguments: Any) -> None:
        run_command(lambda: function(**arguments), as_json, debug)

    return command


def run_command(command: Command, as_json: bool, debug: bool) -> None:
    """Call a command, print its result on stdout, and exit with a status other than 0 if it failed.

    Everything else that the command prints goes to stderr.

    Args:
        command: returns the result. None prints nothing: on ranks other than 0, or if the command wrote its own output.
        as_json: print the summary as one JSON object instead of a table.
        debug: raise errors with their traceback.
    """
    with exit_without_group_teardown():
        started = time.perf_counter()
        escape_unencodable_characters()
        with redirect_stdout(sys.stderr):
            result = _call(command, debug)
        if result is None:
            return
        summary = {**result.to_dict(), "seconds": time.perf_counter() - started}
        if as_json:
            click.echo(json.dumps(summary))
        else:
            print_summary(summary)
        if result.exit_status:
            sys.exit(result.exit_status)


def _call(command: Command, debug: bool) -> Result | None:
    """Call a command. Print an error without its traceback, and exit."""
    # Libraries address these warnings to developers.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        return command()
    except (click.ClickException, BrokenPipeError):
        raise  # click prints the first; the second, from `pipe ... | head`, is no error
    except KeyboardInterrupt as error:
        if local_rank() == 0:
            click.echo(err=True)
            print_error(describe_error(error))
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        is_config_error = isinstance(error, ConfigError)
        if local_rank() == 0 or not is_config_error:  # a config error is the same on every rank
            print_error(describe_error(error))
        sys.exit(2 if is_config_error else 1)


def describe_error(error: BaseException) -> str:
    """Return what failed and what to do next."""
    from cache.spec import CacheError
    from pipeline.common.files import disk_problem

    if isinstance(error, PipelineError | CacheError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted. Completed work is saved. Rerun the command, or for training: pipe train RUN --resume"
    if isinstance(error, UnicodeEncodeError):
        return locale_problem(error.object) or f"{error.object!a}: cannot be encoded as {error.encoding}"
    if problem := disk_problem(error):
        return problem
    if isinstance(error, OSError):
        return str(error)
    from pipeline.blip2.memory import is_out_of_memory

    message = (str(error).strip() or "no message").splitlines()[0]
    hint = ". Reduce the batch size: train.micro_batch, *.batch_size" if is_out_of_memory(error) else ""
    return f"{type(error).__name__}: {message}{hint}. Use --debug to see the traceback"
