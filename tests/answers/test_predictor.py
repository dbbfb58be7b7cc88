"""Predictions on image files and images in memory, without a cache."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import rounding
import torch
from checkpoints import shards_of
from PIL import ExifTags, Image
from rounding import relative_difference
from transformers import Blip2ForConditionalGeneration

import pipeline.answers.predictor
from cache.reader import FeatureReader
from pipeline.answers.predictor import ImageEncoder, Predictor
from pipeline.blip2.checkpoint import ENCODER_PREFIXES, LANGUAGE_MODEL_PREFIXES
from pipeline.commands.train import train_run
from pipeline.common.errors import ConfigError, PipelineError
from pipeline.config import Config
from pipeline.encoding.images import ImageError
from pipeline.runs.run import Run

QUESTION = "what shape is it?"


@pytest.fixture(scope="module")
def run(cached: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = Run(tmp_path_factory.mktemp("runs") / "first")
    train_run(cached, folder)
    return folder


@pytest.fixture(scope="module")
def predictor(run: Run) -> Predictor:
    return Predictor(run)


@pytest.fixture
def image(cached: Config) -> Path:
    return Path(FeatureReader(cached.cache.dir).text("val").record(0)["image"])


def test_image_in_memory_gives_the_prediction_of_its_file(predictor: Predictor, image: Path) -> None:
    from_file, from_text = predictor.predict(image, QUESTION), predictor.predict(str(image), QUESTION)
    in_memory = predictor.predict(Image.open(image), QUESTION)
    assert (from_file.image, from_text.image, in_memory.image) == (str(image), str(image), None)
    for prediction in (from_text, in_memory):
        assert (prediction.answer, prediction.probability) == (from_file.answer, from_file.probability)
    assert (from_file.run, from_file.question) == (str(predictor.run.path), QUESTION)
    assert from_file.to_dict().keys() == {"run", "image", "question", "answer", "probability", "seconds"}


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "I;16", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_features_of_an_image_in_memory_equal_those_of_its_file(
    cached: Config, mode: str, orientation: int, tmp_path: Path
) -> None:
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    source = Image.fromarray(noise)
    (source.convert("L").convert(mode) if mode == "I;16" else source.convert(mode)).save(path, exif=exif)
    encoder = ImageEncoder(cached)
    expected = encoder(path)
    with Image.open(path) as opened:
        assert torch.equal(encoder(opened), expected)
        assert torch.equal(encoder(opened), expected), "the image is unchanged"
        rotated = encoder(opened.transpose(Image.Transpose.ROTATE_180))
    assert not torch.equal(rotated, expected)


def test_models_are_loaded_once_when_first_needed(
    run: Run, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    for name in ("load_base", "load_encoder"):
        load = getattr(pipeline.answers.predictor, name)
        monkeypatch.setattr(
            pipeline.answers.predictor, name, lambda *args, name=name, load=load: loads.append(name) or load(*args)
        )
    predictor = Predictor(run.path)
    with pytest.raises(PipelineError, match="the question is empty"):
        predictor.predict(image, " ")
    with pytest.raises(PipelineError, match="the question is too long: "):
        predictor.predict(image, "why " * 300)
    with pytest.raises(ImageError, match=rf"{tmp_path}/none\.png: not found"):
        predictor.predict(tmp_path / "none.png", QUESTION)
    assert loads == []
    predictor.predict(image, QUESTION)
    predictor.predict(Image.open(image), "where is it?")
    assert loads == ["load_encoder", "load_base"]


def test_damaged_image_in_memory_is_an_error_and_the_predictor_stays_usable(
    predictor: Predictor, image: Path, tmp_path: Path
) -> None:
    Image.effect_noise((64, 48), 90).save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match="L image of 64 x 48 pixels: cannot be decoded: "):
        predictor.predict(Image.open(tmp_path / "cut.png"), QUESTION)
    with pytest.raises(ImageError, match=rf"{tmp_path}/cut\.png: "):
        predictor.predict(tmp_path / "cut.png", QUESTION)
    assert predictor.predict(image, QUESTION).answer


def test_overrides_and_adapter_are_options(run: Run, image: Path) -> None:
    short = Predictor(run, ("evaluate.max_new_tokens=1",), with_adapter=False)
    assert short.config.evaluate.max_new_tokens == 1
    assert not hasattr(short.model, "peft_config")
    with pytest.raises(ConfigError, match="lora"):
        Predictor(run, ("lora.r=2",))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_features_equal_those_of_the_cache_in_its_dtype(cached: Config, image: Path, dtype: str) -> None:
    reader = FeatureReader(cached.cache.dir)
    stored = reader.gather(reader.text("val").image_row[:1])[0]
    config = cached.model_copy(update={"cache": cached.cache.model_copy(update={"dtype": dtype})})
    features = ImageEncoder(config)(image)
    assert str(features.dtype) == f"torch.{dtype}"
    stored_step = torch.finfo(getattr(torch, dtype)).eps
    difference = relative_difference(features.float(), torch.from_numpy(stored))
    assert difference <= rounding.FLOAT32 + stored_step


def test_image_of_more_than_8_bits_gives_a_warning(
    cached: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    encode = ImageEncoder(cached)
    path = tmp_path / "scan.png"
    Image.effect_noise((64, 64), 90).convert("I;16").save(path)
    warning = "has more than 8 bits a channel or float pixels: scaled to its own range"
    assert encode(path).isfinite().all()
    assert f"{path} {warning}" in capfd.readouterr().err
    encode(Image.open(path))
    assert f"I;16 image of 64 x 64 pixels {warning}" in capfd.readouterr().err
    Image.effect_noise((64, 64), 90).save(path)
    encode(path)
    assert capfd.readouterr().err == ""


def test_encoder_dtype_is_that_of_the_cache_unless_the_config_names_one(cached: Config) -> None:
    def dtype(name: str, **cache_settings: object) -> str:
        precompute = cached.precompute.model_copy(update={"dtype": name})
        cache = cached.cache.model_copy(update=cache_settings)
        return str(ImageEncoder(cached.model_copy(update={"precompute": precompute, "cache": cache})).encoder_dtype)

    assert dtype("auto") == "torch.float32"  # that of the cache, whatever auto means on this machine
    assert dtype("bfloat16") == "torch.bfloat16"
    assert dtype("float16", dir=Path("/no/such/cache")) == "torch.float16"


def test_features_beyond_the_storage_dtype_are_an_error(
    cached: Config, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cached.model_copy(update={"cache": cached.cache.model_copy(update={"dtype": "float16"})})
    encode = ImageEncoder(config)
    monkeypatch.setattr(type(encode.encoder), "forward", lambda self, pixels: pixels.new_full((1, 16, 128), 1e6))
    with pytest.raises(PipelineError, match="its features are not finite in float16"):
        encode(image)


def test_checkpoint_without_its_encoder_is_an_error(run: Run, checkpoint: Path, image: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    Blip2ForConditionalGeneration.from_pretrained(checkpoint).save_pretrained(folder, max_shard_size="200KB")
    for path in checkpoint.glob("*.json"):
        if not (folder / path.name).exists():
            shutil.copy(path, folder)
    for shard in shards_of(folder, ENCODER_PREFIXES) - shards_of(folder, LANGUAGE_MODEL_PREFIXES):
        (folder / shard).unlink()
    with pytest.raises(PipelineError, match="model-"):
        Predictor(run, (f"model.checkpoint={folder}",)).predict(image, QUESTION)
