"""How right an answer is, from 0 to 100, given the answers that people gave.

`official` is the VQA challenge's own count (GT-Vision-Lab/VQA,
PythonEvaluationTools/vqaEvaluation/vqaEval.py, as of March 2021), quirks and all, so that its numbers can
stand beside published ones. `exact` is for data sets with one right answer a question (easy-VQA, GQA).
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from pipeline.errors import PipelineError

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
# The original also looks behind for a digit, but misspells it as "(?!<=", which always holds.
_PERIOD = re.compile(r"\.(?!\d)")
# The original passes re.UNICODE where `sub` takes its count: later periods stay.
_PERIODS_REMOVED = int(re.UNICODE)


def vqa_accuracy(prediction: str, answers: Sequence[str], method: str = "official") -> float:
    """Accuracy of one predicted answer against the people's answers, 0 to 100 and not rounded.

    Methods:
        official: the VQA challenge's. Line ends, tabs and outer spaces go from both sides; only if the
            answers then differ among themselves are both sides normalised (punctuation, case, number
            words, articles, contractions). Each answer is left out in turn and the prediction scores
            min(1, matches among the others / 3); the result is the mean. The original rounds to two
            digits in its summary, which is left to the caller. n answers stand for n records with
            distinct `answer_id`: leaving one out never takes an equal one with it. Fewer than four
            answers cannot reach 100, and a single answer always scores 0, as nothing is left when it
            is left out: use `exact` there.
        exact: 100 if the prediction equals one of the answers, spaces around them and case apart; else 0.

    Agrees with vqaEval.py read as Python 3. Under Python 2 the original takes only 0 to 9 for digits
    beside a comma or period, and lower-cases a few letters (final sigma, dotted I) otherwise.

    Raises:
        PipelineError: an unknown method, or no answers (the original divides by zero).
    """
    if method not in METHODS:
        raise PipelineError(f"no accuracy method {method!r}; allowed: {', '.join(METHODS)}")
    if not answers:
        raise PipelineError("no answers to score against: a split without answers has no accuracy")
    return METHODS[method](prediction, answers)


def _official(prediction: str, answers: Sequence[str]) -> float:
    prediction, answers = _flatten(prediction), [_flatten(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = _normalise(prediction), [_normalise(answer) for answer in answers]
    count, matches = len(answers), answers.count(prediction)
    # Matches among the others: one fewer when the answer left out is itself a match.
    thirds = matches * min(FULL_AGREEMENT, matches - 1) + (count - matches) * min(FULL_AGREEMENT, matches)
    return 100 * thirds / (FULL_AGREEMENT * count)


def _exact(prediction: str, answers: Sequence[str]) -> float:
    return 100.0 if prediction.strip().lower() in {answer.strip().lower() for answer in answers} else 0.0


METHODS: dict[str, Callable[[str, Sequence[str]], float]] = {"official": _official, "exact": _exact}


def _flatten(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 16)  # a split repeats a few thousand answers millions of times
def _normalise(text: str) -> str:
    words = (NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(text: str) -> str:
    """A mark with a space on either side anywhere in `text` goes; else it becomes a space.

    A comma between digits anywhere makes every mark go.
    """
    number = _COMMA_IN_NUMBER.search(text)
    gone = [mark for mark in PUNCTUATION if number or f"{mark} " in text or f" {mark}" in text]
    marks = str.maketrans(PUNCTUATION, " " * len(PUNCTUATION)) | dict.fromkeys(map(ord, gone))
    return _PERIOD.sub("", text.translate(marks), count=_PERIODS_REMOVED)
