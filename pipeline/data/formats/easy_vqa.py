"""Read easy-VQA, a PyPI package."""

from importlib.util import find_spec
from pathlib import Path

from pipeline.common.errors import PipelineError
from pipeline.data.examples import Split, VQAExample
from pipeline.data.records import RecordError, answer_text, field, list_of, parse_json, prefix_errors
from pipeline.data.sources import Sources, collect, image_resolver


def read(sources: Sources) -> Split:
    """Read easy-VQA (PyPI: easy-vqa). The package contains text and images, so no path is needed.

    `data/{split}/questions.json` is [[question, answer, image id], ...]; the id is the position.
    """
    if sources.split not in ("train", "test"):
        raise PipelineError(f"easy_vqa has the splits train and test, not {sources.split!r}")
    package = find_spec("easy_vqa")
    if package is None or not package.submodule_search_locations:
        raise PipelineError("data.format easy_vqa needs the easy-vqa package: pip install easy-vqa")
    folder = Path(package.submodule_search_locations[0], "data", sources.split)
    resolve_image = image_resolver(folder / "images")

    def example(position: int, record: object) -> VQAExample:
        if not isinstance(record, list) or len(record) != 3:
            raise RecordError("not a list of question, answer and image id")
        fields = dict(zip(("question", "answer", "image id"), record, strict=True))
        answer = answer_text(fields["answer"])
        answer_type = "yes/no" if answer in ("yes", "no") else "other"
        image = resolve_image(f"{field(fields, 'image id', int)}.png")
        return VQAExample(position, image, field(fields, "question", str), (answer,), answer_type)

    path = folder / "questions.json"
    with prefix_errors(path):
        records = list_of(parse_json(sources.read_text(path)))
        return collect(sources, path, "[{}]", enumerate(records), example)
