"""The sections of the config, except `data`: keys, units and defaults."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from pipeline.common.terminal import locale_problem
from pipeline.overrides import union_members

PositiveInt = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Split = Literal["train", "val", "test"]
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]

_HUB_ID_OR_PATH = {"checkpoint", "dataset", "image_dataset"}


class Section(BaseModel):
    """A section of the config. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _expand_home(cls, value: object, info: ValidationInfo) -> object:
        """Replace a leading ~ in a path by the home directory."""
        name = info.field_name or ""
        is_path = name in _HUB_ID_OR_PATH or Path in union_members(cls.model_fields[name].annotation)
        if not (is_path and isinstance(value, str | Path)):
            return value
        if problem := locale_problem(str(value)):
            raise ValueError(problem)
        if not str(value).startswith("~"):
            return value
        try:
            return str(Path(value).expanduser())
        except RuntimeError:
            raise ValueError("the home directory that ~ stands for is unknown; write the full path") from None


class ModelConfig(Section):
    """The BLIP-2 checkpoint."""

    checkpoint: str = "Salesforce/blip2-opt-2.7b"
    """BLIP-2 with an OPT language model, in safetensors: a Hugging Face Hub id, a folder, or embedded, the small
    checkpoint inside the package."""
    revision: str | None = None
    """Branch, tag or commit on the Hub. null: the main branch."""


class CacheConfig(Section):
    """The feature cache."""

    dir: Path
    """Folder of the cache."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Dtype of the stored query features."""
    part_rows: PositiveInt = 1024
    """Images per file. With several ranks, each encodes whole files."""
    io: Literal["memmap", "pread"] = "memmap"
    """How features are read. pread is slower, and safe on network file systems."""


class PrecomputeConfig(Section):
    """Stage one: encoding of the images."""

    batch_size: PositiveInt = 64
    """Images per batch."""
    num_workers: NonNegativeInt = 2
    """Threads that decode images. 0 is the same as 1."""
    dtype: ComputeDtype = "auto"
    """Dtype of the encoder. auto: bfloat16 if the device computes in it, else float16 on CUDA and float32 on a CPU."""
    compile: bool = False
    """Compile the encoder with torch.compile. Takes a minute or more, and is not faster on a CPU."""
    thumbnail_size: Annotated[int, Field(ge=0, le=1024)] = 128
    """Longer side of the thumbnails for `pipe report`, in pixels. 0: no thumbnails."""
    on_invalid: Literal["error", "skip"] = "error"
    """Whether to stop at, or skip, invalid questions: no image, no answer, a duplicate id, too many tokens."""


class QuantizationConfig(Section):
    """Quantization of the linear layers of the language model."""

    bits: Literal[4] | None = 4
    """Bits per weight. null: not quantized."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type of bitsandbytes."""
    double_quant: bool = True
    """Quantize the quantization constants too."""
    compute_dtype: ComputeDtype = "auto"
    """Dtype of the language model. auto: as for precompute.dtype."""


class LoraConfig(Section):
    """The LoRA adapter."""

    r: PositiveInt = 16
    """Rank."""
    alpha: PositiveInt = 32
    """Scaling: updates are multiplied by alpha / r."""
    dropout: Probability = 0.05
    """Dropout probability of the adapter's input."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = ("q_proj", "v_proj")
    """Linear layers of the language model, by name or by the end of their path. all-linear: all in its decoder."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases to train: none, all, or those of the target modules."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _accept_all_linear(cls, names: object) -> object:
        return (names,) if names == "all-linear" else names


class TrainConfig(Section):
    """Stage two: training."""

    epochs: Annotated[float, Field(gt=0)] = 3
    """Passes over the training questions."""
    max_steps: PositiveInt | None = None
    """Optimizer steps, instead of epochs. null: by epochs."""
    batch_size: PositiveInt = 64
    """Questions per optimizer step, over all ranks."""
    micro_batch: PositiveInt | Literal["auto"] = "auto"
    """Questions per forward pass; gradients are accumulated over a batch. auto: as many as fit into memory."""
    answers: Literal["auto", "most_common", "sampled", "all"] = "auto"
    """Training target of a question with several reference answers.

    most_common: the most common answer. sampled: one answer per epoch, in proportion to its count. all: every answer,
    weighted by its count. auto: all for captions, else most_common, which VQA accuracy rewards and which is cheapest.
    """
    share_prefix: bool = True
    """Compute the common prefix of the questions on an image once: the image and the start of the prompt."""
    learning_rate: Annotated[float, Field(gt=0)] = 2.0e-4
    """Peak learning rate of AdamW."""
    lr_scheduler: Literal["linear", "cosine", "constant_with_warmup"] = "cosine"
    """Learning rate schedule after the warmup."""
    warmup_steps: NonNegativeInt = 100
    """Optimizer steps of linear warmup."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Maximum gradient norm; larger gradients are clipped. 0: no clipping."""
    dropout: Probability | None = None
    """Dropout probability of the language model. null: that of the checkpoint."""
    save_steps: PositiveInt = 500
    """Optimizer steps between checkpoints."""
    save_minutes: Annotated[float, Field(gt=0)] | None = 15
    """Minutes between checkpoints, if steps are slow. null: by save_steps only."""
    save_total_limit: PositiveInt = 2
    """Number of checkpoints to keep; older ones are deleted."""
    logging_steps: PositiveInt = 10
    """Optimizer steps between two rows of metrics.jsonl."""
    report_to: tuple[str, ...] = ()
    """Trackers that transformers supports: tensorboard, wandb, mlflow, trackio, ..."""
    lora_monitor_steps: PositiveInt | None = 50
    """Optimizer steps between measurements of the LoRA weights; the last step is always measured. null: never."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third slower."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Whether to stop at, or skip, a step with a non-finite loss or gradient."""
    seed: Seed = 0
    """Seed of the LoRA initialization, the order of the questions, and dropout."""
    output_dir: Path = Path("runs")
    """Folder of the run folders."""


class ValidationConfig(Section):
    """Validation during training: greedy predictions on another split, scored by evaluate.metric.

    The adapter with the best accuracy is kept.
    """

    steps: PositiveInt | None = None
    """Optimizer steps between validations; the last step is always validated. null: no validation."""
    split: Split = "val"
    """Split to validate on."""
    questions: PositiveInt = 1000
    """Maximum number of questions: all those on randomly selected images, the same in every validation."""
    seed: Seed = 0
    """Seed of that selection. Runs with the same seed are validated on the same questions."""
    patience: PositiveInt | None = None
    """Stop training after this many validations without a better accuracy. null: never."""

    @model_validator(mode="after")
    def _check_patience(self) -> "ValidationConfig":
        if self.patience is not None and self.steps is None:
            raise ValueError("patience counts validations; set steps too")
        return self


class EvaluateConfig(Section):
    """Generation of predictions, and their metric."""

    split: Split = "val"
    """Split to evaluate on."""
    batch_size: PositiveInt = 64
    """Questions per batch."""
    num_beams: PositiveInt = 1
    """Beams of beam search. 1: greedy decoding."""
    max_new_tokens: PositiveInt = 10
    """Maximum number of generated tokens."""
    min_new_tokens: NonNegativeInt = 0
    """Minimum number of generated tokens before the end token."""
    length_penalty: float = 1.0
    """Exponent of the length that beam scores are divided by. Smaller values prefer shorter predictions."""
    metric: Literal["official", "lavis", "lmms-eval", "a-okvqa", "exact"] = "official"
    """official: VQA accuracy as in the VQAv2 evaluation script. lavis, lmms-eval, a-okvqa: as in those projects.
    exact: exact match with the only reference."""

    @model_validator(mode="after")
    def _check_token_range(self) -> "EvaluateConfig":
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}")
        return self
