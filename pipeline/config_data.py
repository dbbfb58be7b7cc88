"""The `data` section of the config: keys and defaults."""

from pathlib import Path

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pipeline.common.table_name import TableName, is_local
from pipeline.config_sections import Section

SPLITS = ("train", "val", "test")
_JSON_FILES = {"annotations", "questions"}


class SplitFiles(Section):
    """Location of one split.

    `data.format` decides which keys are needed: a format of files takes `annotations`, `questions` and `images`; the
    format hf takes the others.
    """

    annotations: Path | None = None
    """File with the annotations."""
    questions: Path | None = None
    """File with the questions, if the format has one."""
    images: Path | None = None
    """Folder with the images."""
    dataset: str | None = None
    """Table of the format hf: a Hugging Face Hub id, a folder, or Parquet or Arrow files, also with wildcards (*)."""
    subset: str | None = None
    """Subset of `dataset`, which the datasets library calls its config."""
    dataset_split: str | None = None
    """Split of `dataset`, also a part of it: `train[:90%]`. null: the same name as in the config, or the only one."""
    revision: str | None = None
    """Branch, tag or commit on the Hub. null: the main branch."""
    image_dataset: str | None = None
    """Second table, which has the images by id. null: the images are in `dataset`."""
    image_subset: str | None = None
    """Subset of `image_dataset`."""

    @property
    def tables(self) -> dict[str, TableName]:
        """The tables of the split, by config key."""
        if self.dataset is None:
            return {}
        tables = {"dataset": TableName(self.dataset, self.subset, self.dataset_split, self.revision)}
        if self.image_dataset or self.image_subset:
            whole_split = (self.dataset_split or "").partition("[")[0] or None
            revision = None if self.image_dataset else self.revision
            name = self.image_dataset or self.dataset
            tables["image_dataset"] = TableName(name, self.image_subset, whole_split, revision)
        return tables

    def absolute(self) -> "SplitFiles":
        """Return a copy with absolute paths."""
        paths = {name: path.absolute() for name, path in dict(self).items() if isinstance(path, Path)}
        tables = {key: getattr(self, key) for key in ("dataset", "image_dataset")}
        local = {key: str(Path(name).absolute()) for key, name in tables.items() if name and is_local(name)}
        return self.model_copy(update=paths | local)


class DataConfig(Section):
    """The dataset, and the prompt that its questions are put into."""

    format: str = "jsonl"
    """Format of the dataset: jsonl, vqav2, aokvqa, vizwiz, textvqa, gqa, lavis, coco_captions, easy_vqa or hf."""
    prompt: str = Field(None, validate_default=True)
    """Prompt in training and evaluation, in which {question} is replaced. null: "Question: {question} Answer:", the
    prompt of BLIP-2; for coco_captions, which has no questions, "a photo of"."""
    train: SplitFiles | None = None
    """Location of the training split."""
    val: SplitFiles | None = None
    """Location of the validation split."""
    test: SplitFiles | None = None
    """Location of the test split."""

    @field_validator("prompt", mode="before")
    @classmethod
    def _default_prompt(cls, prompt: object, info: ValidationInfo) -> object:
        return _prompt_of(info) if prompt is None else prompt

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str, info: ValidationInfo) -> str:
        needs_question = "{question}" in _prompt_of(info)
        count = prompt.count("{question}")
        has_other_brace = set("{}") & set(prompt.replace("{question}", ""))
        if count > 1 or (needs_question and not count) or has_other_brace:
            raise ValueError("must contain {question} once and no other brace")
        return prompt

    @model_validator(mode="after")
    def _check_keys_of_format(self) -> "DataConfig":
        foreign = _JSON_FILES if self.format == "hf" else set(SplitFiles.model_fields) - _JSON_FILES - {"images"}
        for split, files in self.splits.items():
            given = [key for key, value in files if value is not None and key in foreign]
            if given:
                raise ValueError(f"{split}.{given[0]} is not a key of the format {self.format}")
        return self

    @property
    def splits(self) -> dict[str, SplitFiles]:
        """The splits of the dataset, in the order train, val, test."""
        splits = {name: getattr(self, name) for name in SPLITS}
        return {name: files for name, files in splits.items() if files is not None}


def _prompt_of(info: ValidationInfo) -> str:
    """Return the default prompt of `data.format`."""
    return "a photo of" if info.data.get("format") == "coco_captions" else "Question: {question} Answer:"
