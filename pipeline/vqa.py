"""Visual question answering data sets in their published formats -> `VQAExample`s.

A reader a format, listed in `FORMATS`. A reader checks the text that it reads: a malformed record is an error that
says where it stands, a well-formed one that training cannot use is left out and listed. Whether the pictures are there
is for the stage that opens them.
"""

import difflib
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import ConfigError, PipelineError
from pipeline.examples import Split
from pipeline.formats import easy_vqa, hf, jsonl, vqav2
from pipeline.sources import OnRead, Sources
from pipeline.tables import TableName

FORMATS: dict[str, Callable[[Sources], Split]] = {
    "easy_vqa": easy_vqa.read,
    "jsonl": jsonl.read,
    "vqav2": vqav2.read,
    "hf": hf.read,
}


def read_examples(
    format: str,
    split: str,
    annotations: Path | None = None,
    images: Path | None = None,
    questions: Path | None = None,
    on_read: OnRead = lambda path, data: None,
    tables: Mapping[str, TableName] | None = None,
) -> Split:
    """All questions of one split, in the file's order, and what is left out.

    Which files a format needs, and what stands in them, is told at its reader below. The paths are
    those of the config's `data.{split}`; `on_read` is told the bytes of each file. Left out are questions
    without an answer, except on splits whose name begins with "test", and of usable questions with the
    same id all but the first.

    Raises:
        ConfigError: an unknown format.
        PipelineError: an unknown split, a file that is not set, not there, not UTF-8 or not
            JSON, a malformed record (file and position are named), or no questions that can be used.
    """
    if format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, n=1, cutoff=0)[0]
        raise ConfigError(f"no data.format {format!r}; nearest: {near}; allowed: {', '.join(FORMATS)}")
    with _without_garbage_collection():
        examples, left_out = FORMATS[format](Sources(split, annotations, images, questions, on_read, tables or {}))
    if not examples:
        dataset = tables["dataset"].dataset if tables else None
        message = f"data.{split}: no questions in {questions or annotations or dataset or format}"
        if left_out:
            message += f" that can be used: {len(left_out)} left out, the last at {left_out[-1].where}: "
            message += left_out[-1].reason
        raise PipelineError(message)
    return Split(examples, left_out)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Parsing makes millions of objects that are all kept: searching them for garbage takes a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
