"""How right an answer is, from 0 to 100, given the answers that people gave.

`official`, `lavis`, `lmms-eval` and `a-okvqa` count as published scripts do, quirks and all, so that the numbers can
stand beside published ones. `exact` is for data sets with one right answer a question (easy-VQA, GQA).
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from pipeline.common.errors import PipelineError

FULL_AGREEMENT = 3  # so many other people's same answer makes an answer wholly right
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
# As published, oddities (somebody'd, 'ow's'at) and gaps (couldntve) included; without the entries that can
# never apply, because a word arrives here in lower case ("Im") or would stay as it is ("let's").
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
# The originals also look behind for a digit, but misspell it as "(?!<=", which always holds.
_PERIOD = re.compile(r"\.(?!\d)")
# The originals pass re.UNICODE where `sub` takes its count: later periods stay.
_PERIODS_REMOVED = int(re.UNICODE)


def vqa_accuracy(prediction: str, answers: Sequence[str], metric: str = "official") -> float:
    """Accuracy of one predicted answer against the people's answers, 0 to 100 and not rounded.

    The first three methods leave each answer out in turn: the prediction scores min(1, matches among the
    others / 3), and the result is the mean. n answers stand for n records with distinct `answer_id`: leaving
    one out never takes an equal one with it. Fewer than four answers cannot reach 100, and a single answer
    always scores 0, as nothing is left when it is left out: use `exact` there.

    Methods:
        official: the VQA challenge's (GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py, as
            of March 2021). Line ends, tabs and outer spaces go from both sides; only if the answers then
            differ among themselves are both sides normalised (punctuation, case, number words, articles,
            contractions).
        lavis: that of BLIP-2's own code (salesforce/LAVIS, lavis/common/vqa_tools/vqa_eval.py, as of November
            2024). The prediction is always stripped and normalised; the answers lose their punctuation
            alone, and only if they differ. One that nothing normalised can equal ("two", "the cat", "Yes",
            "dont", a unanimous "x-ray") is not even matched by itself.
        lmms-eval: that of its VQAv2 task (EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/vqav2/utils.py and
            _task_utils/vqa_eval_metric.py, as of January 2026). Both sides are always stripped and
            normalised, and a number may have several commas in a row ("1,,000").
        a-okvqa: that of A-OKVQA's direct answers (allenai/aokvqa, evaluation/eval_predictions.py, as of May
            2024): min(1, matches / 3) over all answers, the texts compared as they stand. It skips questions
            marked `difficult_direct_answer` and gives 0 where a prediction is missing: both are the caller's.
        exact: 100 if the prediction equals one of the answers, spaces around them and case apart; else 0, and
            for an empty prediction.

    The first two round in their summaries, which is left to the caller. `official` agrees with vqaEval.py
    read as Python 3. Under Python 2 the original takes only 0 to 9 for digits beside a comma or period, and
    lower-cases a few letters (final sigma, dotted I) otherwise.

    Raises:
        PipelineError: an unknown metric, or no answers (the originals fail, a-okvqa's gives 0).
    """
    if metric not in METRICS:
        raise PipelineError(f"no accuracy metric {metric!r}; allowed: {', '.join(METRICS)}")
    if not answers:
        raise PipelineError("no answers to score against: a split without answers has no accuracy")
    return METRICS[metric](prediction, answers)


def _official(prediction: str, answers: Sequence[str]) -> float:
    prediction, answers = _flatten(prediction), [_flatten(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = _normalise(prediction), [_normalise(answer) for answer in answers]
    return _mean_over_left_out(prediction, answers)


def _lavis(prediction: str, answers: Sequence[str]) -> float:
    if len(set(answers)) > 1:
        answers = [_without_punctuation(answer) for answer in answers]
    return _mean_over_left_out(_normalise(_flatten(prediction)), answers)


def _lmms_eval(prediction: str, answers: Sequence[str]) -> float:
    prediction, *answers = (_normalise(_flatten(text), _COMMAS_IN_NUMBER) for text in (prediction, *answers))
    return _mean_over_left_out(prediction, answers)


def _a_okvqa(prediction: str, answers: Sequence[str]) -> float:
    return 100 * min(FULL_AGREEMENT, answers.count(prediction)) / FULL_AGREEMENT


def _exact(prediction: str, answers: Sequence[str]) -> float:
    said = prediction.strip().lower()
    return 100.0 if said and said in {answer.strip().lower() for answer in answers} else 0.0


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "official": _official,
    "lavis": _lavis,
    "lmms-eval": _lmms_eval,
    "a-okvqa": _a_okvqa,
    "exact": _exact,
}
FOR_SEVERAL = ("official", "lavis", "lmms-eval", "a-okvqa")
"""Cannot give a single answer 100: nothing, or a third."""


def _mean_over_left_out(prediction: str, answers: Sequence[str]) -> float:
    count, matches = len(answers), answers.count(prediction)
    # Matches among the others: one fewer when the answer left out is itself a match.
    thirds = matches * min(FULL_AGREEMENT, matches - 1) + (count - matches) * min(FULL_AGREEMENT, matches)
    return 100 * thirds / (FULL_AGREEMENT * count)


def _flatten(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 16)  # a split repeats a few thousand answers millions of times
def _normalise(text: str, comma: re.Pattern[str] = _COMMA_IN_NUMBER) -> str:
    words = (NUMBERS.get(word, word) for word in _without_punctuation(text, comma).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=1 << 16)
def _without_punctuation(text: str, comma: re.Pattern[str] = _COMMA_IN_NUMBER) -> str:
    """A mark with a space on either side anywhere in `text` goes; else it becomes a space.

    A comma between digits anywhere makes every mark go.
    """
    number = comma.search(text)
    gone = [mark for mark in PUNCTUATION if number or f"{mark} " in text or f" {mark}" in text]
    marks = str.maketrans(PUNCTUATION, " " * len(PUNCTUATION)) | dict.fromkeys(map(ord, gone))
    return _PERIOD.sub("", text.translate(marks), count=_PERIODS_REMOVED)
