"""Questions and answers are tokenized as plain text, and only what the model can generate is trained."""

import json
from pathlib import Path

import numpy as np
import pytest
from data_set import write_config, write_data_set
from transformers import AutoTokenizer

from cache.reader import FeatureReader
from pipeline.answers.scores import score
from pipeline.batches.split import load_tokenizer, open_split
from pipeline.commands.evaluate import evaluate
from pipeline.commands.precompute import precompute
from pipeline.commands.train import train_run
from pipeline.common.errors import PipelineError
from pipeline.config import Config, load_config
from pipeline.data.examples import VQAExample, is_blank
from pipeline.data.targets import Targets
from pipeline.data.text import PromptTokenizer, retokenize, select, tokenize, truncated_answers
from pipeline.runs.run import Run

PROMPT = "Question: {question} Answer:"
ORDINARY = ["what is it?", " two  spaces ", "naïve 北京 🚀", "a < b > c", "line\nline", "", "what is it?"]
IMAGE = Path("0.png")


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> PromptTokenizer:
    return PromptTokenizer(checkpoint, PROMPT)


def asked(question: str, *answers: str, number: int = 0) -> VQAExample:
    return VQAExample(number, IMAGE, question, answers)


def data_of(folder: Path, rows: list[dict[str, object]], **sections: object) -> Config:
    """Write images and a config with these rows as train and val."""
    write_data_set(folder, num_images=4)
    for split in ("train", "val"):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return load_config(write_config(folder, **sections))


def row(question: str, answer: object, image: int = 0) -> dict[str, object]:
    return {"image": f"{image}.png", "question": question, "answer": answer}


# ---- special tokens


def test_tokens_equal_those_of_transformers(tokenizer: PromptTokenizer, checkpoint: Path) -> None:
    plain = AutoTokenizer.from_pretrained(checkpoint)
    wanted = plain([PROMPT.replace("{question}", text) for text in ORDINARY], add_special_tokens=False)["input_ids"]
    assert tokenizer.prompts(ORDINARY) == [[tokenizer.bos_token_id, *ids] for ids in wanted]


@pytest.mark.parametrize("special", ["<image>", "</s>", "<pad>", "<s>", "<unk>"])
def test_special_tokens_in_texts_are_plain_text(checkpoint: Path, special: str) -> None:
    texts = [f"{special}\nwhat is it?", f"what does {special} mean?", special]
    for prompt in (PROMPT, f"{special} {PROMPT}"):
        tokenizer = PromptTokenizer(checkpoint, prompt)
        unknown = set(tokenizer.tokenizer.added_tokens_decoder)
        for ids in tokenizer.prompts(texts):
            assert not unknown & set(ids[1:])
        for ids in tokenizer.targets(texts):
            assert not unknown & set(ids[:-1])
        assert tokenizer.decode(tokenizer.targets([f"a {special} b"])) == [f"a {special} b"]


def test_truncation_and_padding_of_the_tokenizer_are_disabled(checkpoint: Path, tmp_path: Path) -> None:
    settings = json.loads((checkpoint / "tokenizer.json").read_text())
    settings["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    settings["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
                           "pad_id": 1, "pad_type_id": 0, "pad_token": "<pad>"}  # fmt: skip
    for path in checkpoint.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    cutting, plain = PromptTokenizer(tmp_path, PROMPT), PromptTokenizer(checkpoint, PROMPT)
    assert cutting.prompts(ORDINARY) == plain.prompts(ORDINARY)
    assert cutting.fingerprint() == plain.fingerprint()


def test_byte_order_mark_is_removed(tokenizer: PromptTokenizer) -> None:
    assert tokenizer.prompts(["\ufeffwhat?", "what?\ufeff"]) == tokenizer.prompts(["what?"] * 2)
    example = asked("\ufeffwhat?", "\ufeffred", "red")
    assert (example.question, example.answers) == ("what?", ("red", "red"))


def test_invalid_unicode_is_reported(tokenizer: PromptTokenizer) -> None:
    with pytest.raises(PipelineError, match="not valid UTF-8"):
        tokenizer.prompts(["gro\udcdf?"])


# ---- reused tokens


def some_text(tokenizer: PromptTokenizer, words: list[str]) -> object:
    examples = [asked(f"what is {word}?", word, number=number) for number, word in enumerate(words)]
    return tokenize(examples, np.zeros(len(words)), tokenizer)


def test_existing_tokens_are_reused(tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [asked(f"what is {word}?", *[word] * bool(word), number=number)
                for number, word in enumerate(["red", "", "a big dog", "red", "two"])]  # fmt: skip
    whole = tokenize(examples, np.arange(5), tokenizer)
    part = select(whole, np.array([3, 1, 0]))
    made: list[str] = []
    encode = PromptTokenizer._encode
    monkeypatch.setattr(PromptTokenizer, "_encode", lambda self, texts: made.extend(texts) or encode(self, texts))
    for earlier, new in ((whole, 0), (part, 2), (select(whole, np.array([], int)), 5)):
        made.clear()
        again = tokenize(examples, np.arange(5), tokenizer, earlier)
        for column in ("records", "prompt_ids", "target_ids"):
            mine, theirs = getattr(again, column), getattr(whole, column)
            assert mine.values.dtype == theirs.values.dtype
            assert np.array_equal(mine.values, theirs.values)
            assert np.array_equal(mine.offsets, theirs.offsets)
        assert sum(text.startswith("Question") for text in made) == new
    edited = [examples[0], asked("what is new?", "new", number=1), *examples[2:]]
    assert retokenize(tokenize(edited, np.arange(5), tokenizer, whole), tokenizer).prompt_ids.values.tolist() == (
        tokenize(edited, np.arange(5), tokenizer).prompt_ids.values.tolist()
    )


def test_another_prompt_reuses_no_tokens(tokenizer: PromptTokenizer, checkpoint: Path) -> None:
    other = PromptTokenizer(checkpoint, "Q: {question} A:")
    examples = [asked("what?", "red")]
    earlier = tokenize(examples, [0], tokenizer)
    assert tokenize(examples, [0], other, earlier).prompt_ids[0].tolist() == other.prompts(["what?"])[0]


def test_unchanged_data_is_not_tokenized(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(data_set / "config.yaml")
    precompute(config)
    before = {split: FeatureReader(config.cache.dir).text(split) for split in ("train", "val")}
    monkeypatch.setattr(PromptTokenizer, "_encode", lambda self, texts: [] if not texts else pytest.fail("tokens made"))
    precompute(config)
    for split, text in before.items():
        again = FeatureReader(config.cache.dir).text(split)
        assert np.array_equal(again.prompt_ids.values, text.prompt_ids.values)
        assert np.array_equal(again.image_row, text.image_row)
    open_split(config, "train")


# ---- blank answers

BLANK = ["", "   ", "\t\n", "\u00a0", "\u3000\u2003", "\u200b", "\ufeff", "\u2028\u200d", "\0"]


@pytest.mark.parametrize("blank", BLANK)
def test_blank_answers_are_dropped(blank: str) -> None:
    assert is_blank(blank)
    assert asked("what?", blank, blank).answers == ()
    example = asked("what?", blank, blank, "red")
    assert len(example.answers) == 3  # scripts count it
    assert example.trainable_answers == ["red"]
    assert example.target == "red"


@pytest.mark.parametrize("text", ["0", ".", "é", "北", "🚀", "\u200bx", "❤\ufe0f"])
def test_visible_text_is_not_blank(text: str) -> None:
    assert not is_blank(text)
    assert asked("what?", text).answers == (text,)


def test_blank_answers_are_never_trained(tmp_path: Path) -> None:
    rows = [{"image": "0.png", "question": "what?", "answers": ["", "", " ", "red", "blue"]}]
    config = data_of(tmp_path, rows, data={"val": None})
    precompute(config)
    tokenizer, text = load_tokenizer(config), open_split(config, "train").text
    assert tokenizer.decode([text.target_ids[0].tolist()]) == ["red"]
    targets = Targets(text, tokenizer, "all", 0)(0, 0)
    assert [(tokenizer.decode([ids.tolist()])[0], weight) for ids, weight in targets] == [("red", 0.5), ("blue", 0.5)]


@pytest.mark.parametrize(("metric", "accuracy"), [("official", 90), ("lavis", 90), ("lmms-eval", 90), ("exact", 100)])
def test_blank_answer_among_ten_is_scored_like_published_scripts(metric: str, accuracy: float) -> None:
    ten = asked("what?", *["red"] * 3, *["blue"] * 6, "")
    assert score([ten], ["red"], metric) == pytest.approx([accuracy])
    assert score([asked("what?", "", " ")], ["red"], metric) == [None]
    assert score([asked("what?", "", "red")], [""], "exact") == [0]


# ---- answers of several lines


@pytest.mark.parametrize(
    ("answer", "trained"),
    [
        ("red\nthe ground is white", "red"),
        ("red\r\nthe ground is white", "red"),
        ("\n\n red \n", "red"),
        ("\n \nred\nblue", "red"),
        ("\u200b\nred", "red"),
        ("red", "red"),
        ("a red\tball", "a red\tball"),
    ],
)
def test_first_line_is_trained(tokenizer: PromptTokenizer, answer: str, trained: str) -> None:
    assert tokenizer.targets([answer]) == tokenizer.targets([trained])
    (ids,) = tokenizer.targets([answer])
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.is_truncated(answer) == (answer.strip() != trained)


def test_special_end_token_truncates_nothing(checkpoint: Path, tmp_path: Path) -> None:
    for path in checkpoint.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = PromptTokenizer(tmp_path, PROMPT)
    (ids,) = tokenizer.targets(["one\ntwo </s> three"])
    assert tokenizer.tokenizer.decode(ids[:-1]) == " one\ntwo </s> three"
    assert ids.count(2) == 1


def test_multiline_answers_are_counted(tokenizer: PromptTokenizer) -> None:
    examples = [
        asked("a?", "red\nblue", "green\nblue", "red", number=0),
        asked("b\nc?", "red", "\nblue\n", number=1),
        asked("c?", "a \\n b", number=2),
        asked("d?", "x\r\ny", number=3),
    ]
    assert truncated_answers(tokenize(examples, np.zeros(4), tokenizer), tokenizer) == {0: 2, 3: 1}
    assert truncated_answers(tokenize([], np.zeros(0), tokenizer), tokenizer) == {}


def test_all_stages_log_multiline_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("what?", "red\nand more"), row("where?", "left", 1), row("who?", "\nme\n", 2)]
    config = data_of(tmp_path, rows)
    assert precompute(config).multiline_answers == {"train": 1, "val": 1}
    assert "train: 1 questions have answers of several lines" in capsys.readouterr().err
    run = Run(tmp_path / "runs" / "a")
    summary = train_run(config, run)
    assert summary
    assert summary.multiline_answers == 1
    assert "only the first non-blank line" in capsys.readouterr().err
    assert evaluate(run).multiline_references == 1
    assert "val: 1 references have several lines" in capsys.readouterr().err


# ---- questions that are too long

LONG = "why " * 400


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_too_long_questions_are_listed_and_skipped(tmp_path: Path, split: str) -> None:
    write_data_set(tmp_path, num_images=4)
    rows = [row("what?", "red"), row(LONG, "red"), row("what?", "blue", 1), row(LONG, "red", 2)]
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps(one) for one in rows))
    files = {"annotations": f"{tmp_path}/long.jsonl", "images": f"{tmp_path}/images"}
    path = write_config(tmp_path, data={split: files})
    with pytest.raises(PipelineError, match=r"2 questions \(longer, .*256 tokens: .*long\.jsonl: line 2, .*line 4\)"):
        precompute(load_config(path))
    assert not (tmp_path / "cache").exists()
    listed = [json.loads(line) for line in (tmp_path / "cache.skipped.jsonl").read_text().splitlines()]
    assert [(one["split"], one["question_id"], one["where"]) for one in listed] == [
        (split, number, f"{tmp_path}/long.jsonl: line {number}") for number in (2, 4)
    ]
    for _ in range(2):  # the second time with cached tokens
        summary = precompute(load_config(path, ["precompute.on_invalid=skip"]))
        assert summary
        assert summary.questions[split] == 2
        assert sum(summary.skipped.values()) == 2
    text = FeatureReader(tmp_path / "cache").text(split)
    assert [text.record(number)["question_id"] for number in range(2)] == [1, 3]


def words(count: int) -> str:
    return " ".join(["red"] * count)


def length_of(tokenizer: PromptTokenizer, question: str, *behind: str) -> int:
    longest = max((len(ids) for ids in tokenizer.targets(behind)), default=0)
    return tokenizer.query_tokens + len(tokenizer.prompts([question])[0]) + longest


def longest_question(tokenizer: PromptTokenizer, room: int) -> str:
    """Return a question that leaves exactly this many tokens for the answer."""
    wanted = tokenizer.max_length - room
    question = words(1)
    while length_of(tokenizer, question) < wanted:
        question += "?"
    assert length_of(tokenizer, question) == wanted
    return question


@pytest.mark.parametrize(
    ("answers", "trained", "fits"),
    [
        (["red", "red", words(50)], "most_common", True),
        (["red", "red", words(50)], "all", False),
        (["red", "red", words(50)], "sampled", False),
        ([words(50)], "most_common", False),
        (["red"], "all", True),
    ],
)
def test_longest_trainable_answer_counts(
    tmp_path: Path, tokenizer: PromptTokenizer, answers: list[str], trained: str, fits: bool
) -> None:
    question = longest_question(tokenizer, len(tokenizer.targets(["red"])[0]))
    rows = [{"image": "0.png", "question": question, "answers": answers}, row("what?", "red")]
    config = data_of(tmp_path, rows, data={"val": None}, train={"answers": trained})
    config = config.model_copy(update={"precompute": config.precompute.model_copy(update={"on_invalid": "skip"})})
    summary = precompute(config)
    assert summary
    assert summary.questions == {"train": 1 + fits}


def test_evaluated_split_requires_positions_for_answers(tmp_path: Path, tokenizer: PromptTokenizer) -> None:
    rows = [row(longest_question(tokenizer, 10), "red"), row("what?", "red")]
    config = data_of(tmp_path, rows, precompute={"on_invalid": "skip"}, evaluate={"max_new_tokens": 11})
    assert precompute(config).questions == {"train": 2, "val": 1}
    config = data_of(tmp_path / "b", rows, precompute={"on_invalid": "skip"}, evaluate={"max_new_tokens": 10})
    assert precompute(config).questions == {"train": 2, "val": 2}
    assert len(open_split(config, "val", trained=False, answered=True).text) == 2
    with pytest.raises(PipelineError, match=r"longer, .*val\.jsonl: line 1\)"):  # of cached text
        precompute(load_config(tmp_path / "b" / "config.yaml", ["evaluate.max_new_tokens=11",
                                                                "precompute.on_invalid=error"]))  # fmt: skip
    longer = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"max_new_tokens": 11})})
    with pytest.raises(
        PipelineError, match=r"question 1 of val is 257 tokens .*max_new_tokens=11.* 256 positions\. Lower"
    ):
        open_split(longer, "val", trained=False, answered=True)


def test_long_text_logs_no_library_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = data_of(tmp_path, [row(LONG, "red"), row("what?", "red")], precompute={"on_invalid": "skip"})
    precompute(config)
    assert "Token indices" not in capfd.readouterr().err
