"""Read visual question answering datasets in their published formats.

Each format is a module in `pipeline.data.formats`, listed in `FORMATS`. A malformed record is an error that names its
position; a well-formed record that training cannot use is skipped and listed. Image files are checked by stage one.
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
    """Return a formatter that writes a list of objects with an id and an answer, under these keys."""

    def results(examples: Sequence[VQAExample], answers: Sequence[str]) -> object:
        pairs = zip(examples, answers, strict=True)
        return [{question: example.question_id, answer: text} for example, text in pairs]

    return results


class Format(NamedTuple):
    """Reader of a dataset, and formatter of predictions for its evaluation server."""

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
    """Return all questions of one split, in the file's order, and the skipped items.

    Questions without an answer are skipped, except on splits whose name begins with "test". Of questions with the same
    id, all but the first are skipped.

    Args:
        format: key of `FORMATS`; the reader in `pipeline.data.formats` documents the files it needs.
        split: name of the split.
        annotations: `data.{split}.annotations` of the config, as are the following paths.
        images: folder of the images.
        questions: a second annotation file.
        on_read: called with the bytes of each file.
        tables: table names by config key.

    Raises:
        ConfigError: an unknown format.
        PipelineError: an unknown split; a file that is not set, not found, not UTF-8 or not JSON; a malformed record;
            files of another format, which is named; or no valid questions.
    """
    read = _format(format).read
    sources = Sources(split, annotations, images, questions, on_read, tables or {})
    try:
        with _without_garbage_collection():
            found = read(sources)
        if not found.examples:
            raise PipelineError(_no_questions_message(format, sources, found))
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
    """Return the formatter of predictions for the dataset's evaluation server. Raises `ConfigError`."""
    return _format(format).results


def _format(name: str) -> Format:
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1, cutoff=0)[0]
        raise ConfigError(f"unknown data.format {name!r}; did you mean {near}? Allowed: {', '.join(FORMATS)}")
    return FORMATS[name]


def _no_questions_message(format: str, sources: Sources, found: Split) -> str:
    tables = [table.dataset for table in sources.tables.values()]
    named = next(filter(None, [sources.questions, sources.annotations, *tables]), format)
    if not found.skipped:
        return f"data.{sources.split}: no questions in {named}"
    last = found.skipped[-1]
    return (
        f"data.{sources.split}: no valid questions in {named}: {len(found.skipped)} skipped, the last one "
        f"at {last.where}: {last.reason}"
    )


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Disable garbage collection: parsing keeps millions of objects, and scanning them takes a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
