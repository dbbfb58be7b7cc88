"""The README's table of what changed and what follows, a test for each line."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from data_set import write_config, write_data_set
from safetensors.torch import load_file, save_file

from cache.manifest import _load_checksummed, _save_checksummed
from cache.reader import FeatureReader
from cache.spec import CacheError
from pipeline.batches.split import open_split
from pipeline.commands.precompute import precompute
from pipeline.common.errors import PipelineError
from pipeline.config import Config, load_config
from pipeline.encoding.encoding_loop import EncodingReport
from pipeline.encoding.images import Preprocessor
from pipeline.encoding.reencode import reencode


@pytest.fixture
def made(tmp_path: Path, checkpoint: Path) -> Path:
    """A data set, a checkpoint of its own, and the finished cache of both."""
    write_data_set(tmp_path)
    shutil.copytree(checkpoint, tmp_path / "model")
    write_config(tmp_path, model={"checkpoint": f"{tmp_path}/model"})
    precompute(config_of(tmp_path))
    return tmp_path


def config_of(folder: Path, *overrides: str) -> Config:
    return load_config(folder / "config.yaml", overrides)


def change_tensor(folder: Path, start: str) -> None:
    """Changes one number of the first tensor whose name begins with `start`."""
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if name.startswith(start))
    tensors[name].view(-1)[0] += 0.25
    save_file(tensors, path, metadata={"format": "pt"})


def change_processor(folder: Path, **changes: object) -> None:
    path = folder / "model" / "processor_config.json"
    content = json.loads(path.read_text())
    content["image_processor"].update(changes)
    path.write_text(json.dumps(content))


def change_config(folder: Path, section: str, **changes: object) -> None:
    path = folder / "model" / "config.json"
    content = json.loads(path.read_text())
    content[section].update(changes)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        pytest.param(lambda f: change_tensor(f, "vision_model."), "encoder_fingerprint: cache has", id="ViT"),
        pytest.param(lambda f: change_tensor(f, "qformer."), "encoder_fingerprint: cache has", id="Q-Former"),
        pytest.param(lambda f: change_tensor(f, "query_tokens"), "encoder_fingerprint: cache has", id="query tokens"),
        pytest.param(
            lambda f: change_config(f, "vision_config", num_attention_heads=2), "encoder_fingerprint", id="heads"
        ),
        pytest.param(
            lambda f: change_config(f, "qformer_config", hidden_act="relu"), "encoder_fingerprint", id="activation"
        ),
        pytest.param(
            lambda f: change_processor(f, image_mean=[0.5, 0.5, 0.5]), "image_mean: cache has .*wanted .0.5", id="mean"
        ),
        pytest.param(lambda f: change_processor(f, resample=2), "resample: cache has 3, wanted 2", id="resampling"),
    ],
)  # fmt: skip
def test_another_encoder_or_other_pixels_are_refused_with_the_difference(
    made: Path, change: Callable[[Path], None], difference: str
) -> None:
    before = {path.name: path.read_bytes() for path in (made / "cache").iterdir()}
    change(made)
    refused(config_of(made), difference)
    assert {path.name: path.read_bytes() for path in (made / "cache").iterdir()} == before


def refused(config: Config, difference: str) -> None:
    """By both stages, before any work."""
    with pytest.raises(CacheError, match=difference):
        precompute(config)
    with pytest.raises((PipelineError, CacheError), match=difference):
        open_split(config, "train")


def test_what_of_the_config_decides_nothing_is_no_difference(made: Path) -> None:
    change_config(made, "vision_config", initializer_range=0.5, attention_dropout=0.1, dtype="bfloat16", new_key=1)
    change_config(made, "text_config", dropout=0.5)
    assert precompute(config_of(made)).encoded == 0
    open_split(config_of(made), "train")


def test_the_settings_are_compared_where_the_encoders_tensors_are_not(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.batches.split.has_half", lambda *_: False)
    open_split(config_of(made), "train")
    change_config(made, "vision_config", num_attention_heads=2)
    with pytest.raises(PipelineError, match=r"vision_config\.num_attention_heads: cache has 4, wanted 2"):
        open_split(config_of(made), "train")


def test_training_names_the_setting_that_differs(made: Path) -> None:
    change_config(made, "qformer_config", hidden_act="relu")
    with pytest.raises(PipelineError, match=r"qformer_config\.hidden_act: cache has gelu, wanted relu\n.*fingerprint"):
        open_split(config_of(made), "train")


def test_encoding_again_tells_rounding_from_another_encoder(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = reencode(made / "cache", 5)
    assert (same.reencoded, same.mismatches) == (5, ())
    change_config(made, "vision_config", hidden_act="relu")
    monkeypatch.setattr("pipeline.encoding.reencode.encoder_spec", lambda *_: FeatureReader(made / "cache").spec)
    other = reencode(made / "cache", 5)
    assert len(other.mismatches) == 5
    shutil.rmtree(made / "images")
    assert reencode(made / "cache", 5).largest_difference is None


def test_another_image_backend_is_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings_json = Preprocessor.settings_json
    monkeypatch.setattr(
        Preprocessor, "settings_json", lambda self: settings_json(self).replace('"pil"', '"torchvision"')
    )
    refused(config_of(made), 'backend: cache has "pil", wanted "torchvision"')


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("cache.dtype=float16", "dtype: cache has float32, wanted float16"),
        ("precompute.dtype=bfloat16", "encoder_dtype: cache has float32, wanted bfloat16"),
    ],
)
def test_another_dtype_is_refused(made: Path, override: str, difference: str) -> None:
    refused(config_of(made, override), difference)


def test_another_format_version_is_refused(made: Path) -> None:
    path = made / "cache" / "manifest.json"
    content = {key: value for key, value in _load_checksummed(path).items() if key != "sha256"}
    _save_checksummed(path, {**content, "format_version": 2})
    refused(config_of(made), "version 2, only .* 1 is supported")


def test_changed_bytes_are_encoded_again_though_name_size_and_time_are_the_same(made: Path) -> None:
    picture = made / "images" / "5.png"
    found = picture.stat()
    write_data_set(made / "other", seed=5)
    new = next(
        data
        for path in sorted((made / "other" / "images").iterdir())
        if len(data := path.read_bytes()) <= found.st_size
    )
    picture.write_bytes(new.ljust(found.st_size, b"\0"))  # what follows a PNG's end is not looked at
    os.utime(picture, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert (picture.stat().st_size, picture.stat().st_mtime_ns) == (found.st_size, found.st_mtime_ns)
    summary = precompute(config_of(made))
    assert (summary.encoded, summary.reused) == (1, 23)


def test_a_renamed_picture_costs_the_text_alone(made: Path) -> None:
    (made / "images" / "0.png").rename(made / "images" / "Katze 🐘.png")
    path = made / "train.jsonl"
    path.write_text(path.read_text().replace('"0.png"', '"Katze 🐘.png"'))
    summary = precompute(config_of(made))
    assert (summary.encoded, summary.reused) == (0, 24)
    assert FeatureReader(made / "cache").text("train").record(0)["image"].endswith("Katze 🐘.png")


def test_an_edited_annotation_stops_training_and_costs_the_text_alone(made: Path) -> None:
    path = made / "train.jsonl"
    answer = json.loads(path.read_text().splitlines()[0])["answer"]
    path.write_text(path.read_text().replace(f'"{answer}"', '"changed"', 1))
    with pytest.raises(PipelineError, match=r"train\.jsonl \(data.train.annotations\) has changed since .* was made"):
        open_split(config_of(made), "train")
    open_split(config_of(made), "val")
    summary = precompute(config_of(made))
    assert (summary.encoded, summary.reused) == (0, 24)
    assert open_split(config_of(made), "train").text.record(0)["answers"] == ["changed"]


def test_an_annotation_edited_while_pictures_are_encoded_stops_training(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made / "train.jsonl"
    monkeypatch.setattr(
        "pipeline.commands.precompute._encode",
        lambda *_: (path.write_text("\n" + path.read_text()), EncodingReport())[1],
    )
    precompute(config_of(made))
    with pytest.raises(PipelineError, match=r"train\.jsonl .* has changed since .* was made"):
        open_split(config_of(made), "train")


def test_another_folder_of_pictures_is_told_and_not_used(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = f"data.train.images={made}/other"
    open_split(config_of(made, other), "train")
    assert "other" not in capsys.readouterr().err  # it is not on this machine
    (made / "other").mkdir()
    open_split(config_of(made, other), "train")
    assert f"holds the images of {made}/images; using these" in capsys.readouterr().err
    (made / "link").symlink_to(made / "images")
    open_split(config_of(made, f"data.train.images={made}/link"), "train")
    assert "these are used" not in capsys.readouterr().err


def test_without_pictures_and_annotations_training_goes_on(made: Path) -> None:
    before = open_split(config_of(made), "train").for_training([0, 7])
    shutil.rmtree(made / "images")
    (made / "train.jsonl").unlink()
    after = open_split(config_of(made), "train").for_training([0, 7])
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one.query_features, other.query_features)
        assert one.tree.labels.tolist() == other.tree.labels.tolist()


def test_another_prompt_costs_the_tokens_alone(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(made, 'data.prompt="Q: {question} A:"')
    before = open_split(config_of(made), "train").text
    after = open_split(config, "train").text
    assert "tokenizing train again" in capsys.readouterr().err
    assert list(before.prompt_ids[0]) != list(after.prompt_ids[0])
    assert precompute(config).encoded == 0
    open_split(config, "train")
    assert "tokenizing train" not in capsys.readouterr().err


def test_another_tokenizer_costs_the_tokens_alone(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"].pop()  # the word that it makes falls apart
    path.write_text(json.dumps(tokenizer))
    open_split(config_of(made), "train")
    assert "the prompt or the tokenizer has changed" in capsys.readouterr().err
    assert precompute(config_of(made)).encoded == 0


def test_another_language_model_costs_nothing(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in (made / "cache").iterdir()}
    change_tensor(made, "language_model.")
    change_tensor(made, "language_projection.")
    open_split(config_of(made), "train")
    assert "again" not in capsys.readouterr().err
    assert precompute(config_of(made)).encoded == 0
    assert {path.name: path.read_bytes() for path in (made / "cache").iterdir()} == before
