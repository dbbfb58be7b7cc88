"""Compute the VQA accuracy of a prediction, 0 to 100, given its reference answers.

`official`, `lavis`, `lmms-eval` and `a-okvqa` reproduce published scripts, quirks included, so that results are
comparable with published numbers. `exact` is for data sets with one reference per question (easy-VQA, GQA).
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from pipeline.common.errors import PipelineError

FULL_AGREEMENT = 3  # matching references for full accuracy
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
# As published, including oddities (somebody'd, 'ow's'at) and gaps (couldntve), except entries without effect: words
# are lower case at this point ("Im" never matches), and some entries map a word to itself ("let's").
_CONTRACTION_PAIRS = """
    aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've couldnt've=couldn't've
    didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've hadn'tve=hadn't've hasnt=hasn't
    havent=haven't hed=he'd hed've=he'd've he'dve=he'd've hes=he's howd=how'd howll=how'll hows=how's isnt=isn't
    itd=it'd itd've=it'd've it'dve=it'd've itll=it'll maam=ma'am mightnt=mightn't mightnt've=mightn't've
    mightn'tve=mightn't've mightve=might've mustnt=mustn't mustve=must've neednt=needn't notve=not've oclock=o'clock
    oughtnt=oughtn't ow's'at='ow's'at 'ows'at='ow's'at 'ow'sat='ow's'at shant=shan't shed've=she'd've she'dve=she'd've
    shouldve=should've shouldnt=shouldn't shouldnt've=shouldn't've shouldn'tve=shouldn't've somebody'd=somebodyd
    somebodyd've=somebody'd've somebody'dve=somebody'd've somebodyll=somebody'll somebodys=somebody's someoned=someone'd
    someoned've=someone'd've someone'dve=someone'd've someonell=someone'll someones=someone's somethingd=something'd
    somethingd've=something'd've something'dve=something'd've somethingll=something'll thats=that's thered=there'd
    thered've=there'd've there'dve=there'd've therere=there're theres=there's theyd=they'd theyd've=they'd've
    they'dve=they'd've theyll=they'll theyre=they're theyve=they've twas='twas wasnt=wasn't wed've=we'd've
    we'dve=we'd've weve=we've werent=weren't whatll=what'll whatre=what're whats=what's whatve=what've whens=when's
    whered=where'd wheres=where's whereve=where've whod=who'd whod've=who'd've who'dve=who'd've wholl=who'll whos=who's
    whove=who've whyll=why'll whyre=why're whys=why's wont=won't wouldve=would've wouldnt=wouldn't
    wouldnt've=wouldn't've wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll y'allll=y'all'll yall'd've=y'all'd've
    y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd youd've=you'd've you'dve=you'd've youll=you'll youre=you're
    youve=you've
    """
CONTRACTIONS = dict(pair.split("=") for pair in _CONTRACTION_PAIRS.split())

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_COMMAS_IN_NUMBER = re.compile(r"\d,+\d")  # lmms-eval's
# The scripts intend a lookbehind for a digit, but misspell it as "(?!<=", which always holds.
_PERIOD = re.compile(r"\.(?!\d)")
# The scripts pass re.UNICODE as the count of `sub`: later periods stay.
_PERIODS_REMOVED = int(re.UNICODE)


def vqa_accuracy(prediction: str, references: Sequence[str], metric: str = "official") -> float:
    """Return the accuracy of a prediction, 0 to 100 and not rounded.

    The first three metrics average over the references: each is excluded in turn, and the prediction scores
    min(1, matches among the others / 3). n references stand for n records with distinct `answer_id`, so excluding
    one never excludes an equal one with it. With fewer than four references a prediction cannot reach 100, and with a
    single reference it always scores 0, because no other remains: use `exact` there.

    Metrics:
        official: the VQA challenge's (GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py, as
            of March 2021). Both sides lose line ends, tabs and surrounding spaces. Only if the references then
            differ among themselves are both sides normalized (punctuation, case, number words, articles,
            contractions).
        lavis: that of BLIP-2's own code (salesforce/LAVIS, lavis/common/vqa_tools/vqa_eval.py, as of November
            2024). The prediction is always stripped and normalized; the references lose only their punctuation,
            and only if they differ. A reference that no normalized text equals ("two", "the cat", "Yes", "dont", a
            unanimous "x-ray") does not even match itself.
        lmms-eval: that of its VQAv2 task (EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/vqav2/utils.py and
            _task_utils/vqa_eval_metric.py, as of January 2026). Both sides are always stripped and
            normalized, and a number may have several commas in a row ("1,,000").
        a-okvqa: that of A-OKVQA's direct answers (allenai/aokvqa, evaluation/eval_predictions.py, as of May
            2024): min(1, matches / 3) over all references, the texts compared unchanged. The script skips questions
            marked `difficult_direct_answer` and scores a missing prediction 0: both are the caller's task.
        exact: 100 if the prediction equals one of the references, ignoring surrounding spaces and case; else 0, and
            0 for an empty prediction.

    The scripts of the first two round their summaries; rounding is left to the caller. `official` agrees with
    vqaEval.py run as Python 3. Under Python 2 the script recognizes only the digits 0 to 9 beside a comma or period,
    and lower-cases a few letters (final sigma, dotted I) differently.

    Args:
        prediction: the predicted answer.
        references: the annotated answers, one per annotator.
        metric: the name of a metric.

    Raises:
        PipelineError: the metric is unknown, or there are no references (the scripts fail, a-okvqa's gives 0).
    """
    if metric not in METRICS:
        raise PipelineError(f"no accuracy metric {metric!r}; allowed: {', '.join(METRICS)}")
    if not references:
        raise PipelineError("no references: a split without answers has no accuracy")
    return METRICS[metric](prediction, references)


def _official(prediction: str, references: Sequence[str]) -> float:
    prediction, references = _flatten(prediction), [_flatten(reference) for reference in references]
    if len(set(references)) > 1:
        prediction, references = _normalize(prediction), [_normalize(reference) for reference in references]
    return _mean_excluding_each(prediction, references)


def _lavis(prediction: str, references: Sequence[str]) -> float:
    if len(set(references)) > 1:
        references = [_without_punctuation(reference) for reference in references]
    return _mean_excluding_each(_normalize(_flatten(prediction)), references)


def _lmms_eval(prediction: str, references: Sequence[str]) -> float:
    prediction, *references = (_normalize(_flatten(text), _COMMAS_IN_NUMBER) for text in (prediction, *references))
    return _mean_excluding_each(prediction, references)


def _a_okvqa(prediction: str, references: Sequence[str]) -> float:
    return 100 * min(FULL_AGREEMENT, references.count(prediction)) / FULL_AGREEMENT


def _exact(prediction: str, references: Sequence[str]) -> float:
    folded = prediction.strip().lower()
    return 100.0 if folded and folded in {reference.strip().lower() for reference in references} else 0.0


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "official": _official,
    "lavis": _lavis,
    "lmms-eval": _lmms_eval,
    "a-okvqa": _a_okvqa,
    "exact": _exact,
}
MULTI_REFERENCE_METRICS = ("official", "lavis", "lmms-eval", "a-okvqa")
"""Metrics that cannot reach 100 with a single reference: they give 0, or a third."""


def _mean_excluding_each(prediction: str, references: Sequence[str]) -> float:
    count, matches = len(references), references.count(prediction)
    # Matches among the others: one fewer if the excluded reference is itself a match.
    thirds = matches * min(FULL_AGREEMENT, matches - 1) + (count - matches) * min(FULL_AGREEMENT, matches)
    return 100 * thirds / (FULL_AGREEMENT * count)


def _flatten(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 16)  # a split repeats a few thousand distinct answers millions of times
def _normalize(text: str, comma: re.Pattern[str] = _COMMA_IN_NUMBER) -> str:
    words = (NUMBERS.get(word, word) for word in _without_punctuation(text, comma).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=1 << 16)
def _without_punctuation(text: str, comma: re.Pattern[str] = _COMMA_IN_NUMBER) -> str:
    """Remove or replace the punctuation marks in `text`.

    A mark that has a space on either side anywhere in `text` is removed everywhere; any other becomes a space. A comma
    between digits anywhere removes every mark.
    """
    number = comma.search(text)
    removed = [mark for mark in PUNCTUATION if number or f"{mark} " in text or f" {mark}" in text]
    marks = str.maketrans(PUNCTUATION, " " * len(PUNCTUATION)) | dict.fromkeys(map(ord, removed))
    return _PERIOD.sub("", text.translate(marks), count=_PERIODS_REMOVED)
