"""Answers on pictures that no cache holds are those that an evaluation gives from the cache."""

import errno
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import rounding
import torch
from checkpoints import shards_of
from click.testing import CliRunner, Result
from data_set import write_config
from PIL import Image
from rounding import relative_difference
from transformers import Blip2ForConditionalGeneration

from cache.reader import FeatureReader
from pipeline.answers.predictor import ImageEncoder, Predictor
from pipeline.blip2.checkpoint import ENCODER_PREFIXES, LANGUAGE_MODEL_PREFIXES
from pipeline.cli import main
from pipeline.commands.ask import Conversation, ask
from pipeline.commands.evaluate import evaluate
from pipeline.commands.train import train
from pipeline.common.errors import ConfigError, PipelineError
from pipeline.config import Config
from pipeline.runs.run import Run

QUESTION = "what shape is it?"


@pytest.fixture(scope="module")
def run(cached: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = Run(tmp_path_factory.mktemp("runs") / "first")
    train(cached, folder)
    return folder


@pytest.fixture
def picture(cached: Config) -> Path:
    return Path(FeatureReader(cached.cache.dir).text("val").record(0)["image"])


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
    expected = {row["question_id"]: row["answer"] for row in json.loads(Path(summary["results"]).read_text())}
    told: list[dict[str, Any]] = []
    conversation = Conversation(run, override, with_adapter, told.append)
    text = FeatureReader(cached.cache.dir).text("val")
    for number in range(len(text)):
        conversation.hear(text.record(number)["image"])
        conversation.hear(text.record(number)["question"])
    assert [answer["answer"] for answer in told] == [expected[text.record(n)["question_id"]] for n in range(len(text))]
    assert len(set(expected.values())) > 2
    assert all(0 < answer["probability"] <= 1 for answer in told)
    one = ask(run, Path(told[0]["image"]), told[0]["question"], override, with_adapter)
    assert {**one, "seconds": 0} == {**told[0], "seconds": 0}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_features_are_those_of_the_cache_in_its_dtype(cached: Config, picture: Path, dtype: str) -> None:
    features = FeatureReader(cached.cache.dir)
    stored = features.gather(features.text("val").image_row[:1])[0]
    config = cached.model_copy(update={"cache": cached.cache.model_copy(update={"dtype": dtype})})
    found = ImageEncoder(config)(picture)
    assert str(found.dtype) == f"torch.{dtype}"
    stored_step = torch.finfo(getattr(torch, dtype)).eps
    apart = relative_difference(found.float(), torch.from_numpy(stored))
    assert apart <= rounding.FLOAT32 + stored_step


def test_an_image_of_more_than_8_bits_is_told(
    cached: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    read = ImageEncoder(cached)
    path = tmp_path / "scan.png"
    Image.effect_noise((64, 64), 90).convert("I;16").save(path)
    assert read(path).isfinite().all()
    assert f"{path} has more than 8 bits a channel or float pixels: scaled to its own range" in capfd.readouterr().err
    Image.effect_noise((64, 64), 90).save(path)
    read(path)
    assert capfd.readouterr().err == ""


def test_the_encoder_computes_in_the_caches_dtype_unless_the_config_names_one(cached: Config) -> None:
    def dtype(name: str, **elsewhere: object) -> str:
        precompute = cached.precompute.model_copy(update={"dtype": name})
        cache = cached.cache.model_copy(update=elsewhere)
        return str(ImageEncoder(cached.model_copy(update={"precompute": precompute, "cache": cache})).encoder_dtype)

    assert dtype("auto") == "torch.float32"  # as the cache says, whatever auto is here
    assert dtype("bfloat16") == "torch.bfloat16"
    assert dtype("float16", dir=Path("/no/such/cache")) == "torch.float16"


def test_one_question_gives_a_summary(run: Run, picture: Path) -> None:
    done = pipe("ask", run.path, picture, QUESTION, "--json", "evaluate.max_new_tokens=3")
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary.keys() == {"run", "image", "question", "answer", "probability", "seconds"}
    assert (summary["run"], summary["image"], summary["question"]) == (str(run.path), str(picture), QUESTION)
    table = pipe("ask", run.path, picture, QUESTION, "--preset", "official", "--adapter", "none").stdout
    assert [line.split("  ")[0] for line in table.splitlines()] == list(summary)


def test_a_conversation_from_a_pipe_answers_on_stdout_and_goes_on_after_errors(
    run: Run, cached: Config, tmp_path: Path
) -> None:
    text = FeatureReader(cached.cache.dir).text("val")
    first, second = (text.record(number)["image"] for number in (0, 3))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "notes").write_text("no picture either")
    lines = [
        "nowhere", first, QUESTION, "x" * 2000, "~no-such-user what is it?", f"{tmp_path}/notes", QUESTION,
        f"{tmp_path}/broken.png", second, QUESTION, "other.png", second, "what color is it?", "", QUESTION,
    ]  # fmt: skip
    done = pipe("ask", run.path, typed="\n".join(lines))
    assert done.exit_code == 1, "some lines were not answered"
    answered = [number for number, line in enumerate(done.stdout.splitlines()) if line]
    assert answered == [2, 4, 9, 12, 14], "a line for each line, empty where it is no question or cannot be answered"
    assert len(done.stdout.splitlines()) == len(lines)
    assert done.stdout.splitlines()[9] == ask(run, Path(second), QUESTION, (), True)["answer"]
    told = done.stderr.splitlines()
    assert told[0] == "nowhere: not there; name a picture before a question"
    assert told[1].startswith("the question is too long: ")
    assert [line.split(": ")[0] for line in told[2:]] == [
        f"{tmp_path}/notes", QUESTION, f"{tmp_path}/broken.png", "other.png", "pipe"]  # fmt: skip
    assert told[-1] == "pipe: 6 lines were not answered; what was wrong with each is told above"


def test_a_conversation_may_begin_with_a_picture_and_speak_json(run: Run, picture: Path) -> None:
    done = pipe("ask", run.path, picture, "evaluate.num_beams=2", "--json", typed=f"{QUESTION}\nwhere is it?\n")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["question"] for row in rows] == [QUESTION, "where is it?"]
    assert {row["image"] for row in rows} == {str(picture)}


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
def test_each_line_of_a_pipe_gives_a_line_whatever_its_bytes(
    run: Run, picture: Path, as_json: bool, end: bytes
) -> None:
    lines = [b"\xef\xbb\xbf" + QUESTION.encode(), *ODD.values(), QUESTION.encode()]
    words = ["ask", str(run.path), str(picture), *(["--json"] if as_json else [])]
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
    wanted = ask(run, picture, QUESTION, (), True)["answer"]
    by_name = dict(zip(["first", *ODD, "last"], answers, strict=True))
    assert {by_name[name] for name in ("first", "last", "a mark", "a zero-width space")} == {wanted}
    assert [name for name, answer in by_name.items() if not answer] == [
        "zero bytes alone", "blank", "empty", "too long"]  # fmt: skip


@pytest.mark.parametrize("words", [("wie gro\udcdf?",), ("\ufeff" + QUESTION,), ("what\ud800?",)])
def test_a_question_of_any_bytes_is_answered(run: Run, picture: Path, words: tuple[str]) -> None:
    done = pipe("ask", run.path, picture, *words, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["question"] in ("wie gro\ufffd?", QUESTION, "what\ufffd?")


def test_a_picture_that_is_named_and_cannot_be_read_ends_it(run: Run, tmp_path: Path) -> None:
    done = pipe("ask", run.path, tmp_path / "none.png", typed=f"{QUESTION}\n{QUESTION}\n")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == f"pipe: {tmp_path}/none.png: not there\n"


def test_who_reads_no_further_is_told_nothing(run: Run, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("pipeline.cli._Answers.tell", gone)
    done = pipe("ask", run.path, picture, typed=f"{QUESTION}\n" * 3)
    assert (done.exit_code, done.output) == (1, "")


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["table", "json"])
def test_an_answer_that_stdout_has_no_letters_for_is_escaped(
    run: Run, picture: Path, monkeypatch: pytest.MonkeyPatch, as_json: list[str]
) -> None:
    monkeypatch.setattr(
        "pipeline.data.text.PromptTokenizer.decode", lambda self, tokens: ["gr\xfcn \u2603"] * len(tokens)
    )
    words = ["ask", str(run.path), str(picture)]
    for more, typed in (([QUESTION], None), ([], f"{QUESTION}\n")):
        done = CliRunner(charset="ascii").invoke(main, [*words, *more, *as_json], input=typed)
        assert done.exit_code == 0, done.output
        if as_json or typed:  # click writes a table in UTF-8 where the locale has ASCII alone
            assert ("gr\\u00fcn \\u2603" if as_json else "gr\\xfcn \\u2603") in done.stdout


def test_on_a_terminal_prompts_go_to_stderr(
    run: Run, picture: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal(f"{picture}\n{QUESTION}\n"))
    main(["ask", str(run.path)], standalone_mode=False)
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 1
    assert "picture: " in err
    assert "question: " in err


def test_what_cannot_be_asked_is_told_in_a_line(run: Run, picture: Path, tmp_path: Path) -> None:
    for words, message in (
        ((run.path, picture, " "), "the question is empty"),
        ((run.path, picture, "why " * 300), "the question is too long: "),
        ((run.path, "nowhere.png", QUESTION), "nowhere.png: not there"),
        ((run.path, tmp_path, QUESTION), f"{tmp_path}: a folder, not a file"),
        ((run.path, run.config, QUESTION), f"{run.config}: not a picture"),
        ((tmp_path, picture, QUESTION), f"{tmp_path}: not a run folder"),
    ):
        done = pipe("ask", *words)
        assert done.exit_code == 1
        assert done.stderr.splitlines()[-1].startswith(f"pipe: {message}")
        assert done.stdout == ""
    for words, message in (
        ((picture, "what", "shape"), "a question is one word, in quotes"),
        ((picture, QUESTION, "evaluate.beams=3"), "unknown key evaluate.beams"),
        ((picture, QUESTION, "lora.r=3"), "lora is not looked at any more"),
    ):
        done = pipe("ask", run.path, *words)
        assert (done.exit_code, message in done.stderr) == (2, True), done.stderr


def test_a_run_without_an_adapter_is_told(cached: Config, picture: Path, tmp_path: Path) -> None:
    unfinished = Run(tmp_path / "unfinished")
    unfinished.start(cached)
    with pytest.raises(PipelineError, match="no adapter yet"):
        ask(unfinished, picture, QUESTION, (), True)


def test_a_checkpoint_without_its_encoder_is_told(run: Run, checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    Blip2ForConditionalGeneration.from_pretrained(checkpoint).save_pretrained(folder, max_shard_size="200KB")
    for path in checkpoint.glob("*.json"):
        if not (folder / path.name).exists():
            shutil.copy(path, folder)
    for shard in shards_of(folder, ENCODER_PREFIXES) - shards_of(folder, LANGUAGE_MODEL_PREFIXES):
        (folder / shard).unlink()
    with pytest.raises(PipelineError, match="the checkpoint is not whole, it lacks model-"):
        ask(run, picture, QUESTION, (f"model.checkpoint={folder}",), True)


def test_features_beyond_the_storage_dtype_are_told(
    cached: Config, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cached.model_copy(update={"cache": cached.cache.model_copy(update={"dtype": "float16"})})
    look = ImageEncoder(config)
    monkeypatch.setattr(type(look.encoder), "forward", lambda self, pixels: pixels.new_full((1, 16, 128), 1e6))
    with pytest.raises(PipelineError, match="its features are not finite in float16"):
        look(picture)


def test_a_run_of_captions_needs_no_question(run: Run, cached: Config, picture: Path, tmp_path: Path) -> None:
    captions = Run(tmp_path / "captions")
    shutil.copytree(run.path, captions.path)
    write_config(captions.path, data={"format": "coco_captions"}, cache={"dir": str(cached.cache.dir)})
    told: list[dict[str, Any]] = []
    conversation = Conversation(captions, (), True, told.append)
    conversation.hear(str(picture))
    assert conversation.awaits == "picture"
    assert [answer["question"] for answer in told] == [""]
    with pytest.raises(ConfigError):
        Conversation(run, ("lora.r=2",), True, told.append)
    assert not Predictor(captions, captions.trained_config(), True).asks
