"""Visual question answering data sets in their published formats -> `VQAExample`s.

A module a format in `pipeline.data.formats`, listed in `FORMATS`. A reader checks the text that it reads: a malformed
record is an error that says where it stands, a well-formed one that training cannot use is left out and listed.
Whether the pictures are there is for the stage that opens them.
"""

import difflib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pipeline.common.errors import ConfigError, PipelineError
from pipeline.common.table_name import TableName
from pipeline.data.examples import Split, VQAExample
from pipeline.data.formats import aokvqa, coco_captions, easy_vqa, gqa, hf, jsonl, lavis, textvqa, vizwiz, vqav2
from pipeline.data.recognition import suggest_format
from pipeline.data.sources import OnRead, Sources

Results = Callable[[Sequence[VQAExample], Sequence[str]], object]


def _rows(question: str, answer: str) -> Results:
    """A list of objects with an id and an answer, under these names."""

    def results(examples: Sequence[VQAExample], answers: Sequence[str]) -> object:
        pairs = zip(examples, answers, strict=True)
        return [{question: example.question_id, answer: text} for example, text in pairs]

    return results


class Format(NamedTuple):
    """How a data set's files are read, and how answers are handed in to its evaluation server."""

    read: Callable[[Sources], Split]
    results: Results = _rows("question_id", "answer")


FORMATS = {
    "easy_vqa": Format(easy_vqa.read),
    "jsonl": Format(jsonl.read),
    "vqav2": Format(vqav2.read),
    "aokvqa": Format(aokvqa.read, aokvqa.results),
    "vizwiz": Format(vizwiz.read, _rows("image", "answer")),
    "textvqa": Format(textvqa.read),
    "gqa": Format(gqa.read, _rows("questionId", "prediction")),
    "lavis": Format(lavis.read),
    "coco_captions": Format(coco_captions.read, _rows("image_id", "caption")),
    "hf": Format(hf.read),
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

    Which files a format needs, and what stands in them, is told at its reader in `pipeline.data.formats`. The paths are
    those of the config's `data.{split}`; `on_read` is told the bytes of each file. Left out are questions
    without an answer, except on splits whose name begins with "test", and of usable questions with the
    same id all but the first.

    Raises:
        ConfigError: an unknown format.
        PipelineError: an unknown split, a file that is not set, not there, not UTF-8 or not
            JSON, a malformed record (file and position are named), files of another format (it is named), or no
            questions that can be used.
    """
    read = _format(format).read
    sources = Sources(split, annotations, images, questions, on_read, tables or {})
    try:
        with _without_garbage_collection():
            found = read(sources)
        if not found.examples:
            raise PipelineError(_nothing(format, sources, found))
    except PipelineError as error:
        instead = suggest_format(format, sources)
        if instead is None:
            raise
        raise PipelineError(f"{instead} ({error})") from error
    # A test split may lack answers; it may also have them where another format has its own.
    if not any(example.answers for example in found.examples) and (instead := suggest_format(format, sources)):
        raise PipelineError(instead)
    return found


def results_formatter(format: str) -> Results:
    """Puts answers as the data set's evaluation takes them, in JSON types. ConfigError for an unknown format."""
    return _format(format).results


def _format(name: str) -> Format:
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1, cutoff=0)[0]
        raise ConfigError(f"no data.format {name!r}; nearest: {near}; allowed: {', '.join(FORMATS)}")
    return FORMATS[name]


def _nothing(format: str, sources: Sources, found: Split) -> str:
    tables = [table.dataset for table in sources.tables.values()]
    named = next(filter(None, [sources.questions, sources.annotations, *tables]), format)
    message = f"data.{sources.split}: no questions in {named}"
    if not found.skipped:
        return message
    last = found.skipped[-1]
    return f"{message} that can be used: {len(found.skipped)} left out, the last at {last.where}: {last.reason}"


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
