"""Read the captions of COCO: images to describe, without questions."""

from pipeline.data.examples import NO_IMAGE, SkippedItem, Split, VQAExample
from pipeline.data.records import answer_of, field, map_records, object_of, parse_json, prefix_errors
from pipeline.data.sources import Sources, collect, image_resolver


def read(sources: Sources) -> Split:
    """Read COCO captions, captions_{split}.json.

    `images[]{id, file_name}, annotations[]{image_id, caption}`; a test split's image_info_{split}.json has no
    annotations. There is one example per image: its id is the question's id, the question is empty, and the answers are
    the captions in the file's order. Captions of unlisted images are skipped.
    """
    path, resolve_image = sources.require("annotations"), image_resolver(sources.require("images"))
    captions: dict[int, list[str]] = {}
    place = "annotations[{}]"

    def caption(_: int, value: object) -> tuple[int, str]:
        record = object_of(value)
        return field(record, "image_id", int), answer_of(record, "caption")

    def example(_: int, value: object) -> VQAExample:
        record = object_of(value)
        key = field(record, "id", int)
        return VQAExample(key, resolve_image(field(record, "file_name", str)), "", tuple(captions.get(key, ())))

    with prefix_errors(path):
        whole = object_of(parse_json(sources.read_text(path)))
        may_lack = sources.may_lack_answers and "annotations" not in whole
        annotations = [] if may_lack else field(whole, "annotations", list)
        captioned = list(map_records(enumerate(annotations), place, caption))
        for _, (image_id, text) in captioned:
            captions.setdefault(image_id, []).append(text)
        found = collect(sources, path, "images[{}]", enumerate(field(whole, "images", list)), example)
    images = {one.question_id for one in found.examples} | {one.question_id for one in found.skipped}
    unlisted = [
        SkippedItem(sources.split, NO_IMAGE, f"{path}: {place.format(position)}", image_id, questions=0)
        for position, (image_id, _) in captioned
        if image_id not in images
    ]
    return found._replace(skipped=found.skipped + unlisted)
