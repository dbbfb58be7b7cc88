"""What each change to data, config or checkpoint costs, as documented: a test for each."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from data_set import write_config, write_data_set
from pipeline.batches.assemble import open_split
from safetensors.torch import load_file, save_file

from cache.manifest import _load_signed, _save_signed
from cache.reader import FeatureReader
from cache.spec import CacheError
from pipeline.commands.precompute import precompute
from pipeline.commands.repair import reencode
from pipeline.common.errors import PipelineError
from pipeline.config import Config, load_config
from pipeline.encoding.encoding_loop import Encoded
from pipeline.encoding.images import Preprocessor


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Path) -> Path:
    """A folder with a dataset, a checkpoint, and the finished cache of both."""
    write_data_set(tmp_path)
    shutil.copytree(checkpoint, tmp_path / "model")
    write_config(tmp_path, model={"checkpoint": f"{tmp_path}/model"})
    precompute(config_of(tmp_path))
    return tmp_path


def config_of(folder: Path, *overrides: str) -> Config:
    return load_config(folder / "config.yaml", overrides)


def change_tensor(folder: Path, start: str) -> None:
    """Change one value of the first tensor whose name starts with `start`."""
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
def test_changed_encoder_or_preprocessing_is_an_error_with_the_difference(
    folder: Path, change: Callable[[Path], None], difference: str
) -> None:
    before = {path.name: path.read_bytes() for path in (folder / "cache").iterdir()}
    change(folder)
    assert_refused(config_of(folder), difference)
    assert {path.name: path.read_bytes() for path in (folder / "cache").iterdir()} == before


def assert_refused(config: Config, difference: str) -> None:
    """Check that both stages stop with an error before any work."""
    with pytest.raises(CacheError, match=difference):
        precompute(config)
    with pytest.raises((PipelineError, CacheError), match=difference):
        open_split(config, "train")


def test_irrelevant_config_keys_are_no_difference(folder: Path) -> None:
    change_config(folder, "vision_config", initializer_range=0.5, attention_dropout=0.1, dtype="bfloat16", new_key=1)
    change_config(folder, "text_config", dropout=0.5)
    assert precompute(config_of(folder))["encoded"] == 0
    open_split(config_of(folder), "train")


def test_settings_are_compared_without_the_encoder_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.batches.assemble.has_half", lambda *_: False)
    open_split(config_of(folder), "train")
    change_config(folder, "vision_config", num_attention_heads=2)
    with pytest.raises(PipelineError, match=r"vision_config\.num_attention_heads: cache has 4, wanted 2"):
        open_split(config_of(folder), "train")


def test_training_names_the_changed_setting(folder: Path) -> None:
    change_config(folder, "qformer_config", hidden_act="relu")
    with pytest.raises(PipelineError, match=r"qformer_config\.hidden_act: cache has gelu, wanted relu\n.*fingerprint"):
        open_split(config_of(folder), "train")


def test_reencoding_distinguishes_rounding_from_another_encoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = reencode(folder / "cache", 5)
    assert (same["reencoded"], same["reencode_differs"], same["damaged"]) == (5, False, [])
    change_config(folder, "vision_config", hidden_act="relu")
    monkeypatch.setattr("pipeline.commands.repair.encoder_spec", lambda *_: FeatureReader(folder / "cache").spec)
    other = reencode(folder / "cache", 5)
    assert (other["reencode_differs"], len(other["damaged"])) == (True, 5)
    shutil.rmtree(folder / "images")
    assert reencode(folder / "cache", 5)["largest_difference"] is None


def test_changed_image_backend_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = Preprocessor.identity
    monkeypatch.setattr(Preprocessor, "identity", lambda self: identity(self).replace('"pil"', '"torchvision"'))
    assert_refused(config_of(folder), 'backend: cache has "pil", wanted "torchvision"')


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("cache.dtype=float16", "dtype: cache has float32, wanted float16"),
        ("precompute.dtype=bfloat16", "encoder_dtype: cache has float32, wanted bfloat16"),
    ],
)
def test_changed_dtype_is_an_error(folder: Path, override: str, difference: str) -> None:
    assert_refused(config_of(folder, override), difference)


def test_unknown_format_version_is_an_error(folder: Path) -> None:
    path = folder / "cache" / "manifest.json"
    content = {key: value for key, value in _load_signed(path).items() if key != "sha256"}
    _save_signed(path, {**content, "format_version": 2})
    assert_refused(config_of(folder), "version 2, this program knows .* 1")


def test_changed_image_with_the_same_name_size_and_time_is_encoded_again(folder: Path) -> None:
    image = folder / "images" / "5.png"
    stat = image.stat()
    write_data_set(folder / "other", seed=5)
    new = next(
        data
        for path in sorted((folder / "other" / "images").iterdir())
        if len(data := path.read_bytes()) <= stat.st_size
    )
    image.write_bytes(new.ljust(stat.st_size, b"\0"))  # decoders ignore bytes after the end of a PNG
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (image.stat().st_size, image.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    summary = precompute(config_of(folder))
    assert (summary["encoded"], summary["reused"]) == (1, 23)


def test_renamed_image_updates_only_the_text(folder: Path) -> None:
    (folder / "images" / "0.png").rename(folder / "images" / "Katze 🐘.png")
    path = folder / "train.jsonl"
    path.write_text(path.read_text().replace('"0.png"', '"Katze 🐘.png"'))
    summary = precompute(config_of(folder))
    assert (summary["encoded"], summary["reused"]) == (0, 24)
    assert FeatureReader(folder / "cache").text("train").record(0)["image"].endswith("Katze 🐘.png")


def test_edited_annotation_stops_training_and_updates_only_the_text(folder: Path) -> None:
    path = folder / "train.jsonl"
    answer = json.loads(path.read_text().splitlines()[0])["answer"]
    path.write_text(path.read_text().replace(f'"{answer}"', '"changed"', 1))
    with pytest.raises(PipelineError, match=r"train\.jsonl \(data.train.annotations\) is not what .* was made of"):
        open_split(config_of(folder), "train")
    open_split(config_of(folder), "val")
    summary = precompute(config_of(folder))
    assert (summary["encoded"], summary["reused"]) == (0, 24)
    assert open_split(config_of(folder), "train").text.record(0)["answers"] == ["changed"]


def test_annotation_edited_during_encoding_stops_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "train.jsonl"
    monkeypatch.setattr(
        "pipeline.commands.precompute._encode", lambda *_: (path.write_text("\n" + path.read_text()), Encoded())[1]
    )
    precompute(config_of(folder))
    with pytest.raises(PipelineError, match=r"train\.jsonl .* is not what .* was made of"):
        open_split(config_of(folder), "train")


def test_other_image_folder_is_logged_and_not_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = f"data.train.images={folder}/other"
    open_split(config_of(folder, other), "train")
    assert "other" not in capsys.readouterr().err  # the folder does not exist
    (folder / "other").mkdir()
    open_split(config_of(folder, other), "train")
    assert f"holds the pictures of {folder}/images, and these are used" in capsys.readouterr().err
    (folder / "link").symlink_to(folder / "images")
    open_split(config_of(folder, f"data.train.images={folder}/link"), "train")
    assert "these are used" not in capsys.readouterr().err


def test_training_data_opens_without_images_and_annotations(folder: Path) -> None:
    before = open_split(config_of(folder), "train").for_training([0, 7])
    shutil.rmtree(folder / "images")
    (folder / "train.jsonl").unlink()
    after = open_split(config_of(folder), "train").for_training([0, 7])
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one.query_features, other.query_features)
        assert one.tree.labels.tolist() == other.tree.labels.tolist()


def test_changed_prompt_updates_only_the_tokens(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(folder, 'data.prompt="Q: {question} A:"')
    before = open_split(config_of(folder), "train").text
    after = open_split(config, "train").text
    assert "making the tokens of train again" in capsys.readouterr().err
    assert list(before.prompt_ids[0]) != list(after.prompt_ids[0])
    assert precompute(config)["encoded"] == 0
    open_split(config, "train")
    assert "making the tokens" not in capsys.readouterr().err


def test_changed_tokenizer_updates_only_the_tokens(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"].pop()  # its word becomes two tokens
    path.write_text(json.dumps(tokenizer))
    open_split(config_of(folder), "train")
    assert "the prompt or the tokenizer has changed" in capsys.readouterr().err
    assert precompute(config_of(folder))["encoded"] == 0


def test_changed_language_model_changes_nothing_in_the_cache(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in (folder / "cache").iterdir()}
    change_tensor(folder, "language_model.")
    change_tensor(folder, "language_projection.")
    open_split(config_of(folder), "train")
    assert "again" not in capsys.readouterr().err
    assert precompute(config_of(folder))["encoded"] == 0
    assert {path.name: path.read_bytes() for path in (folder / "cache").iterdir()} == before
