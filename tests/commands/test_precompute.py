import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_set import write_config, write_data_set
from safetensors.torch import load_file, save_file

import pipeline.encoding.encoding_loop
from cache.reader import FeatureReader
from cache.spec import CacheError
from pipeline.batches.split import open_split
from pipeline.commands.precompute import estimate_precompute, precompute
from pipeline.commands.repair import repair
from pipeline.common.errors import PipelineError
from pipeline.config import load_config


def digest_of_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_distinct_images_are_encoded_once_and_all_questions_kept(data_set: Path) -> None:
    shutil.copy(data_set / "images" / "0.png", data_set / "images" / "23.png")  # same bytes, another name
    summary = precompute(load_config(data_set / "config.yaml"))
    assert (summary.images, summary.encoded, summary.reused, summary.failed) == (23, 23, 0, 0)
    assert summary.questions == {"train": 54, "val": 18}
    assert summary.images_per_second > 0
    assert summary.cache_bytes > 23 * 16 * 128 * 4
    features = FeatureReader(data_set / "cache")
    assert features.text("train").image_row[0] == features.text("val").image_row[-1]


def test_second_run_encodes_and_changes_nothing(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(data_set / "config.yaml")
    precompute(config)
    before = digest_of_folder(data_set / "cache")
    monkeypatch.setattr("pipeline.commands.precompute.load_encoder", lambda *_: pytest.fail("the encoder was loaded"))
    again = precompute(config)
    assert (again.encoded, again.reused, again.images_per_second) == (0, 24, None)
    assert digest_of_folder(data_set / "cache") == before


def test_interrupted_run_resumes_to_the_same_bytes(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(data_set / "config.yaml", ["cache.part_rows=10"])
    whole = config.model_copy(
        update={"cache": config.cache.model_copy(update={"dir": data_set / "elsewhere" / "whole"})}
    )
    precompute(whole)
    read = pipeline.encoding.encoding_loop.read_image_bytes
    monkeypatch.setattr(
        pipeline.encoding.encoding_loop,
        "read_image_bytes",
        lambda path: (_ for _ in ()).throw(KeyboardInterrupt) if path.name == "18.png" else read(path),
    )
    with pytest.raises(KeyboardInterrupt):
        precompute(config)
    assert not (config.cache.dir / "manifest.json").exists()
    monkeypatch.undo()
    with pytest.raises(CacheError, match="unfinished"):
        FeatureReader(config.cache.dir)
    summary = precompute(config)
    assert 0 < summary.reused < 24
    assert digest_of_folder(config.cache.dir) == digest_of_folder(whole.cache.dir)


def test_only_new_and_changed_images_are_encoded(data_set: Path) -> None:
    config = load_config(data_set / "config.yaml")
    precompute(config)
    write_data_set(data_set / "other", seed=5)
    shutil.copy(data_set / "other" / "images" / "0.png", data_set / "images" / "1.png")  # changed
    shutil.copy(data_set / "other" / "images" / "1.png", data_set / "images" / "new.png")
    with (data_set / "train.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"image": "new.png", "question": "what is it?", "answer": "new"}))
    summary = precompute(config)
    assert (summary.encoded, summary.reused) == (2, 23)
    text = FeatureReader(config.cache.dir).text("train")
    assert text.record(len(text) - 1)["answers"] == ["new"]


def skipped(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_missing_images_raise_or_are_skipped(data_set: Path) -> None:
    for name in ("0.png", "1.png"):
        (data_set / "images" / name).unlink()
    with pytest.raises(PipelineError, match=r"6 questions \(not found: .*/0.png, .*/1.png\).*on_invalid=skip"):
        precompute(load_config(data_set / "config.yaml"))
    report = data_set / "cache.skipped.jsonl"
    assert not (data_set / "cache").exists()
    listed = skipped(report)
    assert [(one["split"], one["reason"], one["questions"]) for one in listed] == [("train", "not found", 3)] * 2
    summary = precompute(load_config(data_set / "config.yaml", ["precompute.on_invalid=skip"]))
    assert (summary.images, summary.failed, summary.questions["train"]) == (22, 2, 48)
    assert summary.skipped == {"not found": 6}
    assert skipped(FeatureReader(data_set / "cache").attachment("skipped.jsonl")) == listed
    assert not report.exists()  # the cache contains it now


def test_training_logs_skipped_questions(data_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data_set / "images" / "0.png").unlink()
    config = load_config(data_set / "config.yaml", ["precompute.on_invalid=skip"])
    precompute(config)
    capsys.readouterr()
    open_split(config, "train")
    assert "3 questions were skipped (not found: 3)" in capsys.readouterr().err


def test_no_images_raise_even_with_skip(data_set: Path) -> None:
    config = load_config(data_set / "config.yaml", ["precompute.on_invalid=skip"])
    shutil.rmtree(data_set / "images")
    with pytest.raises(PipelineError, match=r"images \(data.train.images\): no such folder"):
        precompute(config)
    (data_set / "images").mkdir()
    with pytest.raises(
        PipelineError, match=r"no questions of train, val are left: 72 questions .*Check data.\*.images"
    ):
        precompute(config)


def test_empty_split_raises_even_with_skip(data_set: Path) -> None:
    rows = [json.loads(line) for line in (data_set / "val.jsonl").read_text().splitlines()]
    (data_set / "val.jsonl").write_text("\n".join(json.dumps(row | {"question": "why " * 900}) for row in rows))
    with pytest.raises(
        PipelineError, match=r"no questions of val are left: \d+ questions \(longer, .*val\.jsonl: line 1"
    ):
        precompute(load_config(data_set / "config.yaml", ["precompute.on_invalid=skip"]))


def test_duplicates_and_unanswered_questions_are_counted(data_set: Path) -> None:
    with (data_set / "train.jsonl").open("a") as file:
        for row in ({"question_id": 1, "answer": "twice"}, {"question_id": 99}):
            file.write("\n" + json.dumps({"image": "0.png", "question": "what?", **row}))
    (data_set / "images" / "2.png").rename(data_set / "2.png")
    message = r"3 questions \(not found: .*duplicate question_id: 1 of train at .*train\.jsonl: line 55\)"
    with pytest.raises(PipelineError, match=message):
        precompute(load_config(data_set / "config.yaml"))
    (data_set / "2.png").rename(data_set / "images" / "2.png")
    summary = precompute(load_config(data_set / "config.yaml", ["precompute.on_invalid=skip"]))
    assert summary.skipped == {"duplicate question_id": 1, "no answer": 1}
    assert (summary.questions["train"], summary.failed) == (54, 0)


def truncate(path: Path) -> None:
    """Truncate an image behind its header, so that only decoding fails."""
    path.write_bytes(path.read_bytes()[:-200])


def test_undecodable_image_keeps_the_other_features(data_set: Path) -> None:
    truncate(data_set / "images" / "5.png")
    config = load_config(data_set / "config.yaml")
    with pytest.raises(PipelineError, match=r"3 questions \(cannot be decoded: .*/5\.png\).*on_invalid=skip"):
        precompute(config)
    assert not (data_set / "cache" / "manifest.json").exists()
    assert skipped(data_set / "cache.skipped.jsonl")[0]["image"].endswith("5.png")
    skipping = load_config(data_set / "config.yaml", ["precompute.on_invalid=skip"])
    summary = precompute(skipping)
    assert (summary.encoded, summary.reused, summary.failed) == (0, 23, 1)
    assert summary.questions == {"train": 51, "val": 18}
    write_data_set(data_set / "other", seed=5)
    shutil.copy(data_set / "other" / "images" / "5.png", data_set / "images" / "5.png")
    summary = precompute(config)
    assert (summary.encoded, summary.reused, summary.failed) == (1, 23, 0)


def test_skipped_items_are_logged_once_with_the_path_of_the_list(
    data_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data_set / "images" / "0.png").unlink()
    truncate(data_set / "images" / "5.png")
    precompute(load_config(data_set / "config.yaml", ["precompute.on_invalid=skip"]))
    log = capsys.readouterr().err
    assert (log.count("0.png"), log.count("5.png")) == (1, 1)
    listed = Path(log.rstrip().splitlines()[-1].removeprefix("list of skipped questions: "))
    assert [Path(one["image"]).name for one in skipped(listed)] == ["0.png", "5.png"]
    assert listed.parent == data_set / "cache"
    assert not (data_set / "cache.skipped.jsonl").exists()


@pytest.mark.parametrize(("dtype", "advised"), [("float32", True), ("float16", False), ("bfloat16", False)])
def test_full_disk_error_has_readable_units(
    data_set: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, advised: bool
) -> None:
    monkeypatch.setattr("pipeline.encoding.disk_space.free_disk_bytes", lambda folder: 1000)
    with pytest.raises(PipelineError, match=r"need 0\.\d\d MB, but only 0\.00 MB are free") as error:
        precompute(load_config(data_set / "config.yaml", [f"cache.dtype={dtype}"]))
    assert ("cache.dtype=float16" in str(error.value)) == advised


def test_undecodable_image_leaves_other_features_unchanged(data_set: Path) -> None:
    """A resumed run must give the same bytes whether or not an image of the batch fails."""
    config = load_config(data_set / "config.yaml", ["precompute.on_invalid=skip"])
    precompute(
        config.model_copy(update={"cache": config.cache.model_copy(update={"dir": data_set / "elsewhere" / "whole"})})
    )
    truncate(data_set / "images" / "5.png")
    precompute(config.model_copy(update={"cache": config.cache.model_copy(update={"dir": data_set / "apart" / "c"})}))
    whole, holed = FeatureReader(data_set / "elsewhere" / "whole"), FeatureReader(data_set / "apart" / "c")
    rows = dict(whole.stored())
    shared = [(rows[digest], row) for digest, row in holed.stored()]
    assert len(shared) == 23
    assert np.array_equal(whole.gather([a for a, _ in shared]), holed.gather([b for _, b in shared]))


def test_image_changed_during_the_run_raises(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = pipeline.encoding.encoding_loop.read_image_bytes
    monkeypatch.setattr(
        pipeline.encoding.encoding_loop,
        "read_image_bytes",
        lambda path: read(path.with_name("2.png") if path.name == "5.png" else path),
    )
    with pytest.raises(PipelineError, match="changed since it was first read"):
        precompute(load_config(data_set / "config.yaml"))


def test_cache_of_other_features_raises_and_is_kept(data_set: Path) -> None:
    config = load_config(data_set / "config.yaml")
    precompute(config)
    before = digest_of_folder(data_set / "cache")
    other = load_config(data_set / "config.yaml", ["cache.dtype=float16"])
    with pytest.raises(CacheError, match="dtype: cache has float32, wanted float16"):
        precompute(other)
    with pytest.raises(PipelineError, match="dtype: cache has float32, wanted float16"):
        open_split(other, "train")
    assert digest_of_folder(data_set / "cache") == before


def test_another_encoder_is_detected_before_training(data_set: Path, checkpoint: Path) -> None:
    precompute(load_config(data_set / "config.yaml"))
    other = data_set / "checkpoint"
    shutil.copytree(checkpoint, other)
    tensors = load_file(other / "model.safetensors")
    tensors["query_tokens"][0, 0, 0] += 0.5
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PipelineError, match="encoder_fingerprint: cache has"):
        open_split(load_config(data_set / "config.yaml", [f"model.checkpoint={other}"]), "train")


def test_changed_prompt_retokenizes_the_cached_text(data_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precompute(load_config(data_set / "config.yaml"))
    shutil.rmtree(data_set / "images")
    changed = load_config(data_set / "config.yaml", ['data.prompt="Q: {question} A:"'])
    text = open_split(changed, "train").text
    assert "tokenizing train again" in capsys.readouterr().err
    fresh = open_split(load_config(data_set / "config.yaml"), "train").text
    assert [list(text.target_ids[i]) for i in range(9)] == [list(fresh.target_ids[i]) for i in range(9)]
    assert list(text.prompt_ids[0]) != list(fresh.prompt_ids[0])
    assert np.array_equal(text.image_row, fresh.image_row)


def test_bfloat16_features_stay_bfloat16(data_set: Path) -> None:
    exact, rounded = (
        load_config(data_set / "config.yaml", [f"cache.dtype={dtype}", f"cache.dir={data_set}/{dtype}"])
        for dtype in ("float32", "bfloat16")
    )
    precompute(exact)
    precompute(rounded)
    wanted = open_split(exact, "train").for_training([0])[0].query_features
    found = open_split(rounded, "train").for_training([0])[0].query_features
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted.to(torch.bfloat16))


def test_folder_with_other_files_is_rejected(data_set: Path) -> None:
    (data_set / "cache").mkdir()
    (data_set / "cache" / "thesis.tex").write_text("x")
    with pytest.raises(CacheError, match="contains other files"):
        precompute(load_config(data_set / "config.yaml"))
    assert [path.name for path in (data_set / "cache").iterdir()] == ["thesis.tex"]


def test_missing_split_error_lists_the_cached_splits(data_set: Path) -> None:
    config = load_config(write_config(data_set))
    precompute(config)
    with pytest.raises(CacheError, match="no split 'test'; there are: train, val"):
        open_split(config, "test")


@pytest.mark.slow
def test_compiled_encoder_gives_the_same_features(data_set: Path) -> None:
    eager, compiled = (
        load_config(data_set / "config.yaml", [f"precompute.compile={on}", f"cache.dir={data_set}/{on}/cache"])
        for on in ("false", "true")
    )
    precompute(eager)
    precompute(compiled)
    wanted, found = (FeatureReader(config.cache.dir).gather(np.arange(24)) for config in (eager, compiled))
    assert np.abs(found - wanted).max() < 1e-4


@pytest.mark.parametrize("on_invalid", ["error", "skip"])
def test_images_that_become_unreachable_stop_the_run_without_loss(
    data_set: Path, monkeypatch: pytest.MonkeyPatch, on_invalid: str
) -> None:
    overrides = [f"precompute.on_invalid={on_invalid}", "cache.part_rows=8"]
    whole = load_config(data_set / "config.yaml", [*overrides, f"cache.dir={data_set}/whole"])
    precompute(whole)
    config = load_config(data_set / "config.yaml", [*overrides, f"cache.dir={data_set}/elsewhere/cache"])
    begin, begun = pipeline.encoding.encoding_loop.EncodingLoop._start_decoding, []

    def vanish(self, part, rows, images):
        begun.append(rows)
        if len(begun) == 2:
            (data_set / "images").rename(data_set / "away")
        return begin(self, part, rows, images)

    monkeypatch.setattr(pipeline.encoding.encoding_loop.EncodingLoop, "_start_decoding", vanish)
    with pytest.raises(
        PipelineError, match=r"images/\d+\.png: not found, though it could .* run the same command again"
    ):
        precompute(config)
    monkeypatch.undo()
    (data_set / "away").rename(data_set / "images")
    assert precompute(config).failed == 0
    assert digest_of_folder(config.cache.dir) == digest_of_folder(whole.cache.dir)


def test_out_of_memory_while_decoding_marks_no_row_as_failed(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.Image.Image.resize", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(PipelineError, match=r"images/\d+\.png: not enough memory"):
        precompute(load_config(data_set / "config.yaml", ["precompute.on_invalid=skip"]))
    monkeypatch.undo()
    assert precompute(load_config(data_set / "config.yaml")).failed == 0


def test_estimate_times_valid_unencoded_images(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(data_set / "config.yaml")
    precompute(config)
    write_data_set(data_set / "other", seed=5)
    for number in range(3):
        shutil.copy(data_set / "other" / "images" / f"{number}.png", data_set / "images" / f"{number}.png")
    broken = data_set / "images" / "1.png"
    broken.write_bytes(broken.read_bytes()[:120])
    read, known = [], pipeline.encoding.encoding_loop.read_image_bytes
    monkeypatch.setattr(
        "pipeline.encoding.encoding_loop.read_image_bytes", lambda path: (read.append(path.name), known(path))[1]
    )
    estimate = estimate_precompute(config)
    assert (estimate.to_encode, set(read)) == (3, {"0.png", "1.png", "2.png"})
    assert estimate.images_per_second > 0


def test_cache_may_be_the_current_folder(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data_set / "here").mkdir()
    monkeypatch.chdir(data_set / "here")
    assert precompute(load_config(data_set / "config.yaml", ["cache.dir=."])).encoded == 24


def test_dropped_splits_are_logged(data_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precompute(load_config(data_set / "config.yaml"))
    assert "no longer" not in capsys.readouterr().err
    precompute(load_config(data_set / "config.yaml", ["data.val=null"]))
    assert "splits val of the earlier config are no longer in the cache" in capsys.readouterr().err


def damage(part: Path) -> None:
    data = bytearray(part.read_bytes())
    data[-5] ^= 1
    part.write_bytes(data)


def test_repair_keeps_the_part_size(data_set: Path) -> None:
    config = load_config(data_set / "config.yaml", ["cache.part_rows=10"])
    precompute(config)
    damage(config.cache.dir / "features-00001.h5")
    assert repair(config.cache.dir).encoded == 1
    assert FeatureReader(config.cache.dir).manifest.part_rows == 10


def test_repair_of_an_unreadable_cache_changes_nothing(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(data_set / "config.yaml")
    precompute(config)
    damage(config.cache.dir / "features-00000.h5")
    before = digest_of_folder(config.cache.dir)
    denied = PermissionError(13, "Permission denied")
    monkeypatch.setattr("cache.format.sha256_of", lambda *_: (_ for _ in ()).throw(denied))
    with pytest.raises(PipelineError, match=r"cannot be read, so nothing was changed: .*Permission denied"):
        repair(config.cache.dir)
    assert digest_of_folder(config.cache.dir) == before


def test_repair_works_from_any_folder(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data_set)
    files = {"train": {"annotations": "train.jsonl", "images": "images"}, "val": None}
    config = load_config(write_config(data_set, data=files))
    precompute(config)
    damage(config.cache.dir / "features-00000.h5")
    (data_set / "elsewhere").mkdir()
    monkeypatch.chdir(data_set / "elsewhere")
    assert repair(config.cache.dir).encoded == 1
