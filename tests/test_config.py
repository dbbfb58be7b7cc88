"""The config: keys, defaults, overrides, and errors that name the key and where it is set."""

from pathlib import Path

import pytest

from pipeline.common.errors import ConfigError
from pipeline.config import Config, DataConfig, SplitFiles, flatten, load_config
from pipeline.data.vqa import FORMATS
from pipeline.overrides import combinations_of

CONFIGS = Path(__file__).parents[1] / "configs"
EASY = CONFIGS / "easy_vqa.yaml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_config_is_valid_and_begins_with_its_command(path: Path) -> None:
    load_config(path)
    assert path.read_text().startswith(f"# pipe precompute configs/{path.name} && pipe train configs/{path.name}\n")


def test_vqav2_config_has_the_settings_of_the_recipe() -> None:
    config = load_config(CONFIGS / "vqav2_blip2_opt_2.7b.yaml")
    assert config.model.checkpoint == "Salesforce/blip2-opt-2.7b"
    assert (config.quantization.bits, config.quantization.quant_type, config.quantization.double_quant) == (
        4,
        "nf4",
        True,
    )
    assert (config.lora.r, config.lora.alpha, config.lora.target_modules) == (16, 32, ("q_proj", "v_proj"))
    assert set(config.data.splits) == {"train", "val"}
    assert config.train.micro_batch == "auto"


@pytest.mark.parametrize(
    ("data", "prompt"),
    [
        ({}, "Question: {question} Answer:"),
        ({"prompt": None}, "Question: {question} Answer:"),
        ({"format": "vizwiz", "prompt": "{question}"}, "{question}"),
        ({"format": "coco_captions"}, "a photo of"),
        ({"format": "coco_captions", "prompt": ""}, ""),
        ({"format": "coco_captions", "prompt": "an image of"}, "an image of"),
    ],
)
def test_default_prompt_depends_on_the_format(tmp_path: Path, data: dict[str, str], prompt: str) -> None:
    config = Config.model_validate({"data": {"train": {}, **data}, "cache": {"dir": "x"}})
    assert config.data.prompt == prompt
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("format", "prompt"), [("lavis", "a photo of"), ("lavis", ""), ("coco_captions", "{x}"), ("coco_captions", "{")]
)
def test_prompt_without_the_question_of_the_format_is_an_error(format: str, prompt: str) -> None:
    with pytest.raises(ConfigError, match=r"must contain \{question\} once and no other brace"):
        load_config(EASY, [f"data.format={format}", f"data.prompt={prompt!r}"])


def test_overrides_replace_values_of_the_file_and_are_parsed_as_yaml() -> None:
    config = load_config(
        EASY, ["lora.r=8", "lora.target_modules=[q_proj]", "train.learning_rate=1e-4", "data.test=null"]
    )
    assert config.lora.r == 8
    assert config.lora.target_modules == ("q_proj",)
    assert config.train.learning_rate == 1e-4
    assert set(config.data.splits) == {"train"}


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("data.prompt=Q: {question} A:", "Q: {question} A:"),
        ("data.prompt={question}", "{question}"),
        ('data.prompt="Q: {question}"', "Q: {question}"),
        ("model.revision=1234", "1234"),
        ("model.revision=null", None),
        ("model.checkpoint=[a", "[a"),
        ("cache.dir=2024", Path("2024")),
    ],
)
def test_text_in_an_override_is_unchanged(override: str, found: object) -> None:
    section, key = override.partition("=")[0].split(".")
    assert getattr(getattr(load_config(EASY, [override]), section), key) == found


def test_error_names_the_override_or_file_that_sets_the_key(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("{data: {train: {}}, cache: {dir: x}, lora: {r: 0}}")
    with pytest.raises(ConfigError) as error:
        load_config(path, ["train.epochs=many", "cache={}"])
    lines = str(error.value).splitlines()
    assert any(line.startswith("'train.epochs=many': train.epochs: ") for line in lines)
    assert any(line.startswith("'cache={}': cache.dir is missing") for line in lines)
    assert any(line.startswith(f"{path}: lora.r: ") for line in lines)


def test_folder_instead_of_a_config_is_an_error_that_names_the_config_in_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; give a config file"):
        load_config(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"is a folder; use .*config\.yaml"):
        load_config(tmp_path)


def test_written_config_loads_unchanged(tmp_path: Path) -> None:
    config = load_config(EASY, ["train.seed=7"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.min_new_tokens=20", "evaluate: min_new_tokens 20 is more than max_new_tokens 10"),
        ("validation.patience=3", "patience counts validations; set steps too"),
        ("train.epochz=1", "unknown key train.epochz; did you mean epochs?"),
        ("train.alpha=8", "unknown key train.alpha; did you mean lora.alpha?"),
        ("lora.split=val", "unknown key lora.split; did you mean validation.split or evaluate.split?"),
        ("trian.epochs=1", "unknown key trian; did you mean train?"),
        ("data.train.imagess=x", "unknown key data.train.imagess; did you mean images?"),
        ("lora.zzz=1", "unknown key lora.zzz; known keys: r, alpha, dropout, target_modules, bias"),
        ("train.epochs=many", "train.epochs: input should be a valid number"),
        ("train.batch_size=0", "train.batch_size: input should be greater than 0 (found 0)"),
        ("quantization.bits=8", "quantization.bits: input should be 4"),
        ("train.micro_batch=0", "train.micro_batch: input should be greater than 0, or input should be 'auto'"),
        ("data.prompt='{question} }'", "data.prompt: must contain {question} once and no other brace"),
        ("train.seed=2024-13-45", "the value is not YAML"),
        ("lora.target_modules=q_proj", "lora.target_modules: write a list: [q_proj]"),
        ("train.epochs=.inf", "train.epochs: input should be a finite number"),
        ("data.prompt=hello", "data.prompt: must contain {question} once"),
        ("cache={}", "cache.dir is missing"),
        ("train", "'train' is not an override"),
        ("model.checkpoint.x=1", "checkpoint is a value, not a section"),
        ("lora.r=[1", "the value is not YAML"),
    ],
)
def test_invalid_key_or_value_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(EASY, [override])
    assert message in str(error.value)


def test_all_invalid_keys_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(EASY, ["train.a=1", "lora.b=1"])
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "not a YAML file"),
        (b"- 1", "a config is a mapping"),
        (b"\xff\xfe", "not a YAML file"),
        (b"", "mapping"),
    ],
)
def test_file_that_is_not_a_config_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert str(path) in str(error.value)


def test_missing_config_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such config file"):
        load_config(Path("nowhere.yaml"))


def test_defaults_are_those_of_the_recipe() -> None:
    config = Config.model_validate({"data": {"train": {}}, "cache": {"dir": "x"}})
    assert (config.lora.r, config.lora.alpha, config.lora.dropout, config.lora.bias) == (16, 32, 0.05, "none")
    assert config.data.prompt == "Question: {question} Answer:"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cache: {dir: x}\ndata: {}\ncache: {dir: y}\n", "line 3: duplicate key cache, first in line 1"),
        ("train:\n  epochs: 1\n  'epochs': 2\n", "line 3: duplicate key epochs, first in line 2"),
        (
            "data:\n  train:\n    images: a\n    annotations: b\n    images: c\n",
            "line 5: duplicate key images, first in line 3",
        ),
        ("lora: {target_modules: [{a: 1, a: 2}]}\n", "line 1: duplicate key a, first in line 1"),
        ("a: &a {r: 1}\nb: {<<: *a, r: 2, r: 3}\n", "line 2: duplicate key r, first in line 2"),
        ("train:\n  1: 2\n", "line 2: the key 1 is not text"),
        ("on: {}\n", "line 1: the key on is not text"),
        ("? [a, b]\n: c\n", "line 1: the key is not text"),
        ('{"cache": {"dir": "x"},\n "cache": {"dir": "y"}}', "line 2: duplicate key cache, first in line 1"),
    ],
)
def test_duplicate_or_non_text_key_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_yaml_merges_and_aliases_may_replace_a_key(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: {checkpoint: embedded}\ncache: {dir: x}\n"
        "data: {train: &files {images: a, annotations: b}, val: &other {<<: *files, images: c}, "
        "test: {<<: *other, images: d}}\n"
    )
    config = load_config(path)
    assert [files.images for files in config.data.splits.values()] == [Path("a"), Path("c"), Path("d")]
    assert {files.annotations for files in config.data.splits.values()} == {Path("b")}


def test_duplicate_key_in_an_override_is_an_error_and_the_last_override_wins(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("{data: {train: {}}, cache: {dir: x}}")
    with pytest.raises(ConfigError, match=r"'cache=\{dir: a, dir: b\}': line 1: duplicate key dir, first in line 1"):
        load_config(path, ["cache={dir: a, dir: b}"])
    assert load_config(path, ["lora.r=4", "lora.r=8"]).lora.r == 8
    for overrides in (["lora.r=4,8", "lora.r=2"], ["lora.r=2", "lora.r=4,8"], ["lora.r=4,8,4"]):
        with pytest.raises(ConfigError, match=r"lora\.r (is given|lists a value) twice"):
            combinations_of(overrides, Config)


def test_tilde_is_the_home_directory_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "config.yaml"
    path.write_text(
        "{model: {checkpoint: ~/model}, cache: {dir: ~/cache}, train: {output_dir: ~/runs}, data: {format: hf, "
        "train: {dataset: '~/data/*.parquet', image_dataset: ~/images}}}"
    )
    found = dict(flatten(load_config(path).model_dump(mode="json")))
    keys = ("model.checkpoint", "cache.dir", "train.output_dir", "data.train.dataset", "data.train.image_dataset")
    assert [found[key] for key in keys] == [
        f"{tmp_path}/{name}" for name in ("model", "cache", "runs", "data/*.parquet", "images")
    ]
    files = load_config(
        path, ["data={format: jsonl, train: {annotations: ~/a, images: ~}}", "cache.dir=~", "model.checkpoint=~/m"]
    )
    assert files.data.train is not None
    assert (files.data.train.annotations, files.cache.dir) == (tmp_path / "a", tmp_path)
    assert (files.data.train.images, files.model.checkpoint) == (None, f"{tmp_path}/m")
    assert load_config(path, ["cache.dir=x~/y", "data.prompt=~ {question}"]).cache.dir == Path("x~/y")
    with pytest.raises(ConfigError, match=r"'cache.dir=~no-such-user/x': cache.dir: the home directory that"):
        load_config(path, ["cache.dir=~no-such-user/x"])


def test_config_of_python_dicts_is_not_changed_by_overrides(tmp_path: Path) -> None:
    values = {"data": {"train": {"images": tmp_path}}, "cache": {"dir": "x"}}
    config = load_config(values, ["cache.dir=y", "data.train.annotations=z", "lora.r=4"])
    assert config.data.train is not None
    assert (config.cache.dir, config.data.train.images, config.lora.r) == (Path("y"), tmp_path, 4)
    assert values == {"data": {"train": {"images": tmp_path}}, "cache": {"dir": "x"}}
    with pytest.raises(ConfigError, match=r"^config: unknown key cache\.dirr; did you mean dir\?$"):
        load_config({"data": {"train": {}}, "cache": {"dir": "x", "dirr": "x"}})


@pytest.mark.parametrize("section", sorted(Config.model_fields))
def test_every_key_is_documented(section: str) -> None:
    field = Config.model_fields[section]
    assert field.description
    assert field.annotation is not None
    assert field.annotation.__doc__
    for name, key in field.annotation.model_fields.items():
        assert key.description, f"{section}.{name}"


def test_every_key_of_a_split_is_documented() -> None:
    assert all(key.description for key in SplitFiles.model_fields.values())


def test_data_formats_in_the_documentation_are_all_formats() -> None:
    listed = str(DataConfig.model_fields["format"].description).removeprefix("Format of the dataset: ").rstrip(".")
    assert set(listed.replace(" or ", ", ").split(", ")) == set(FORMATS)
