"""Questions about image files: a single one, a conversation, and the lines of a pipe."""

import errno
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from data_set import write_config

from cache.reader import FeatureReader
from pipeline.answers.predictor import Prediction, Predictor
from pipeline.cli import main
from pipeline.commands.ask import Conversation, ask
from pipeline.commands.evaluate import evaluate
from pipeline.commands.train import train_run
from pipeline.common.errors import PipelineError
from pipeline.config import Config
from pipeline.runs.run import Run

QUESTION = "what shape is it?"


@pytest.fixture(scope="module")
def run(cached: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = Run(tmp_path_factory.mktemp("runs") / "first")
    train_run(cached, folder)
    return folder


@pytest.fixture
def image(cached: Config) -> Path:
    return Path(FeatureReader(cached.cache.dir).text("val").record(0)["image"])


def answer_of(run: Run, image: Path) -> str:
    prediction = ask(run, image, QUESTION)
    assert prediction is not None
    return prediction.answer


def pipe(*words: object, typed: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], input=typed)


@pytest.mark.parametrize("with_adapter", [True, False], ids=["trained", "untrained"])
@pytest.mark.parametrize("bits", ["4", "null"])
def test_answers_equal_those_of_evaluate_from_the_cache(
    run: Run, cached: Config, bits: str, with_adapter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With bfloat16 instructions bitsandbytes computes in them: the rounding of a batch would decide ties.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    override = (f"quantization.bits={bits}",)
    summary = evaluate(run, override, with_adapter)
    expected = {row["question_id"]: row["answer"] for row in json.loads(Path(summary.results).read_text())}
    predictions: list[Prediction] = []
    conversation = Conversation(Predictor(run, override, with_adapter), predictions.append)
    text = FeatureReader(cached.cache.dir).text("val")
    for number in range(len(text)):
        conversation.handle_line(text.record(number)["image"])
        conversation.handle_line(text.record(number)["question"])
    answers = [prediction.answer for prediction in predictions]
    assert answers == [expected[text.record(number)["question_id"]] for number in range(len(text))]
    assert len(set(expected.values())) > 2
    assert all(0 < prediction.probability <= 1 for prediction in predictions)
    first = predictions[0]
    single = ask(run, first.image, first.question, override, with_adapter)
    assert single is not None
    assert replace(single, seconds=0) == replace(first, seconds=0)


def test_single_question_prints_a_summary(run: Run, image: Path) -> None:
    done = pipe("ask", run.path, image, QUESTION, "--json", "evaluate.max_new_tokens=3")
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary.keys() == {"run", "image", "question", "answer", "probability", "seconds"}
    assert (summary["run"], summary["image"], summary["question"]) == (str(run.path), str(image), QUESTION)
    table = pipe("ask", run.path, image, QUESTION, "--preset", "official", "--adapter", "none").stdout
    assert [line.split("  ")[0] for line in table.splitlines()] == list(summary)


def test_pipe_gives_one_line_per_line_and_continues_after_errors(run: Run, cached: Config, tmp_path: Path) -> None:
    text = FeatureReader(cached.cache.dir).text("val")
    first, second = (text.record(number)["image"] for number in (0, 3))
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "notes").write_text("not an image either")
    lines = [
        "nowhere", first, QUESTION, "x" * 2000, "~no-such-user what is it?", f"{tmp_path}/notes", QUESTION,
        f"{tmp_path}/broken.png", second, QUESTION, "other.png", second, "what color is it?", "", QUESTION,
    ]  # fmt: skip
    done = pipe("ask", run.path, typed="\n".join(lines))
    assert done.exit_code == 1, "some lines were not answered"
    answered = [number for number, line in enumerate(done.stdout.splitlines()) if line]
    assert answered == [2, 4, 9, 12, 14], "one line each, empty for images and errors"
    assert len(done.stdout.splitlines()) == len(lines)
    assert done.stdout.splitlines()[9] == answer_of(run, Path(second))
    errors = done.stderr.splitlines()
    assert errors[0] == "nowhere: not found; enter the path of an image first"
    assert errors[1].startswith("the question is too long: ")
    assert [line.split(": ")[0] for line in errors[2:]] == [
        f"{tmp_path}/notes", QUESTION, f"{tmp_path}/broken.png", "other.png", "pipe"]  # fmt: skip
    assert errors[-1] == "pipe: 6 lines were not answered; the errors are listed above"


def test_pipe_takes_a_first_image_and_writes_json(run: Run, image: Path) -> None:
    done = pipe("ask", run.path, image, "evaluate.num_beams=2", "--json", typed=f"{QUESTION}\nwhere is it?\n")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["question"] for row in rows] == [QUESTION, "where is it?"]
    assert {row["image"] for row in rows} == {str(image)}


ODD = {
    "latin-1": "wie gro\xdf?".encode("latin-1"),
    "nothing but invalid": b"\xff\xfe\xfd",
    "a zero byte": b"what\0shape?",
    "zero bytes alone": b"\0\0",
    "a lone carriage return": b"what\rshape?",
    "blank": b"   ",
    "empty": b"",
    "too long": b"why " * 5000,
    "a mark": b"\xef\xbb\xbf" + QUESTION.encode(),
    "a zero-width space": "\u200b".encode() + QUESTION.encode(),
    "half of a surrogate pair": b"\xed\xa0\x80?",
    "U+2028": "what\u2028shape?".encode(),
    "form feed": b"what\x0cshape?",
}


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_pipe_gives_one_line_per_line_for_any_bytes(run: Run, image: Path, as_json: bool, end: bytes) -> None:
    lines = [b"\xef\xbb\xbf" + QUESTION.encode(), *ODD.values(), QUESTION.encode()]
    words = ["ask", str(run.path), str(image), *(["--json"] if as_json else [])]
    done = CliRunner().invoke(main, words, input=end.join(lines))
    assert "Traceback" not in done.stderr
    assert done.exit_code == 1, "one is too long"
    answers = done.stdout.split("\n")[:-1]
    assert len(answers) == len(lines)
    if as_json:
        rows = [json.loads(line) for line in answers]
        assert "too long" in rows[1 + list(ODD).index("too long")]["error"]
        assert rows[1 + list(ODD).index("latin-1")]["question"] == "wie gro\ufffd?"
        answers = [row["answer"] or "" for row in rows]
    expected = answer_of(run, image)
    by_name = dict(zip(["first", *ODD, "last"], answers, strict=True))
    assert {by_name[name] for name in ("first", "last", "a mark", "a zero-width space")} == {expected}
    assert [name for name, answer in by_name.items() if not answer] == [
        "zero bytes alone", "blank", "empty", "too long"]  # fmt: skip


@pytest.mark.parametrize("words", [("wie gro\udcdf?",), ("\ufeff" + QUESTION,), ("what\ud800?",)])
def test_question_of_any_bytes_is_answered(run: Run, image: Path, words: tuple[str]) -> None:
    done = pipe("ask", run.path, image, *words, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["question"] in ("wie gro\ufffd?", QUESTION, "what\ufffd?")


def test_unreadable_first_image_is_fatal(run: Run, tmp_path: Path) -> None:
    done = pipe("ask", run.path, tmp_path / "none.png", typed=f"{QUESTION}\n{QUESTION}\n")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == f"pipe: {tmp_path}/none.png: not found\n"


def test_closed_stdout_is_not_reported(run: Run, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_pipe(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("pipeline.commands.ask.AnswerWriter.write", broken_pipe)
    done = pipe("ask", run.path, image, typed=f"{QUESTION}\n" * 3)
    assert (done.exit_code, done.output) == (1, "")


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["table", "json"])
def test_characters_that_stdout_cannot_encode_are_escaped(
    run: Run, image: Path, monkeypatch: pytest.MonkeyPatch, as_json: list[str]
) -> None:
    monkeypatch.setattr(
        "pipeline.data.text.PromptTokenizer.decode", lambda self, tokens: ["gr\xfcn \u2603"] * len(tokens)
    )
    words = ["ask", str(run.path), str(image)]
    for more, typed in (([QUESTION], None), ([], f"{QUESTION}\n")):
        done = CliRunner(charset="ascii").invoke(main, [*words, *more, *as_json], input=typed)
        assert done.exit_code == 0, done.output
        if as_json or typed:  # click writes a table in UTF-8 where the locale has ASCII alone
            assert ("gr\\u00fcn \\u2603" if as_json else "gr\\xfcn \\u2603") in done.stdout


def test_terminal_prompts_go_to_stderr(
    run: Run, image: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal(f"{image}\n{QUESTION}\n"))
    main(["ask", str(run.path)], standalone_mode=False)
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 1
    assert "image: " in err
    assert "question: " in err


def test_invalid_input_is_a_one_line_error(run: Run, image: Path, tmp_path: Path) -> None:
    for words, message in (
        ((run.path, image, " "), "the question is empty"),
        ((run.path, image, "why " * 300), "the question is too long: "),
        ((run.path, "nowhere.png", QUESTION), "nowhere.png: not found"),
        ((run.path, tmp_path, QUESTION), f"{tmp_path}: a folder, not a file"),
        ((run.path, run.config, QUESTION), f"{run.config}: not a"),
        ((tmp_path, image, QUESTION), f"{tmp_path}: not a run folder"),
    ):
        done = pipe("ask", *words)
        assert done.exit_code == 1
        assert done.stderr.splitlines()[-1].startswith(f"pipe: {message}")
        assert done.stdout == ""
    for words, message in (
        ((image, "what", "shape"), "Put the question in quotes"),
        ((image, QUESTION, "evaluate.beams=3"), "unknown key evaluate.beams"),
        ((image, QUESTION, "lora.r=3"), "lora"),
    ):
        done = pipe("ask", run.path, *words)
        assert (done.exit_code, message in done.stderr) == (2, True), done.stderr


def test_run_without_an_adapter_is_an_error(cached: Config, image: Path, tmp_path: Path) -> None:
    unfinished = Run(tmp_path / "unfinished")
    unfinished.write_config(cached)
    with pytest.raises(PipelineError, match="no adapter yet"):
        ask(unfinished, image, QUESTION)


def test_captioning_run_needs_no_question(run: Run, cached: Config, image: Path, tmp_path: Path) -> None:
    captions = Run(tmp_path / "captions")
    shutil.copytree(run.path, captions.path)
    write_config(captions.path, data={"format": "coco_captions"}, cache={"dir": str(cached.cache.dir)})
    predictor = Predictor(captions)
    assert not predictor.needs_question
    predictions: list[Prediction] = []
    conversation = Conversation(predictor, predictions.append)
    conversation.handle_line(str(image))
    assert conversation.expected_input == "image"
    assert [prediction.question for prediction in predictions] == [""]
    assert predictor.predict(image).answer == predictions[0].answer
