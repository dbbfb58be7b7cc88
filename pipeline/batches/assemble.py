"""What training and evaluation start from, put together from a config: the cache, checked, and the language half."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Blip2Config

from cache.files import sha256_of
from cache.reader import FeatureReader
from pipeline.batches.sampler import QuestionBatchSampler
from pipeline.batches.sequences import MOST_QUESTIONS, ImageSequence, SequenceBuilder
from pipeline.blip2.checkpoint import ENCODER_PREFIXES, LANGUAGE_MODEL_PREFIXES, fetch_checkpoint, has_half, public_name
from pipeline.blip2.device import pick_device, pick_dtype
from pipeline.blip2.language_model import Blip2LanguageHalf, load_language_half
from pipeline.blip2.lora import targets_of
from pipeline.common.distributed import rank, world_size
from pipeline.common.errors import PipelineError
from pipeline.common.progress import log_info
from pipeline.config import Config, SplitFiles
from pipeline.data.lengths import check_lengths, check_room_for_answers
from pipeline.data.tables import identity
from pipeline.data.targets import Targets
from pipeline.data.text import PromptTokenizer, retokenize
from pipeline.encoding.encoder_spec import encoder_settings, encoder_spec


def open_split(
    config: Config,
    split: str,
    features: FeatureReader | None = None,
    trained: bool = True,
    answered: bool = False,
) -> SequenceBuilder:
    """One split of the cache, after a check that it holds what `config` would put there.

    A changed prompt or tokenizer is no difference: the tokens are remade from the cached text. `features` is the cache
    where it is open already. Raises `CacheError` if there is no finished cache, `PipelineError` with every difference
    of its features, and if a question is too long: with its answer where the split is `trained`, with
    `evaluate.max_new_tokens` where it is `answered`.
    """
    folder = fetch_checkpoint(config.model.checkpoint, config.model.revision, LANGUAGE_MODEL_PREFIXES)
    if features is None:
        features = FeatureReader(config.cache.dir, config.cache.io)
        _check_features(features, config, folder)
        _log_skipped(features)
    _check_annotations(features, config, split)
    _log_other_images(features, config, split)
    text = features.text(split)
    tokenizer = PromptTokenizer(folder, config.data.prompt)
    if (text.prompt, text.tokenizer) != (tokenizer.prompt, tokenizer.identity()):
        log_info(f"{config.cache.dir}: the prompt or the tokenizer has changed; making the tokens of {split} again")
        text = retokenize(text, tokenizer)
    if trained:
        check_lengths(text, tokenizer, split)
    if answered:
        check_room_for_answers(text, tokenizer, split, config.evaluate.max_new_tokens)
    return SequenceBuilder(features, text)


def trainable_questions(builder: SequenceBuilder, config: Config) -> np.ndarray:
    """The numbers of the questions that have an answer. Raises `PipelineError` if there is none."""
    numbers = np.flatnonzero(np.diff(builder.text.target_ids.offsets))
    if len(numbers) == 0:
        raise PipelineError(f"{config.cache.dir}: no question of the split train has an answer to train on")
    return numbers


def training_batches(
    config: Config, builder: SequenceBuilder, questions: np.ndarray
) -> tuple[QuestionBatchSampler, Callable[[list[int]], list[ImageSequence]], int | None]:
    """The order of this process's batches, what lays one out, and the questions of a micro-batch (None: what fits)."""
    settings = config.train
    micro_batch = None if settings.micro_batch == "auto" else settings.micro_batch
    most = min(micro_batch or MOST_QUESTIONS, MOST_QUESTIONS)
    image_row = builder.text.image_row if settings.share_prefix else None
    order = QuestionBatchSampler(questions, settings.batch_size, settings.seed, image_row, rank(), world_size())
    targets = _targets(config, builder)

    def build_sequences(numbers: list[int]) -> list[ImageSequence]:
        wanted = (lambda number: targets(number, order.epoch)) if targets else None
        return builder.for_training(numbers, settings.share_prefix, most, wanted)

    return order, build_sequences, micro_batch


def _targets(config: Config, builder: SequenceBuilder) -> Targets | None:
    """What is trained other than the most common answer, whose tokens the cache holds."""
    if config.training_answers == "most_common":
        return None
    tokenizer = load_tokenizer(config)
    targets = Targets(builder.text, tokenizer, config.training_answers, config.train.seed)
    check_lengths(builder.text, tokenizer, "train", targets.longest())
    return targets


def _log_skipped(features: FeatureReader) -> None:
    skipped: dict[str, int] = features.manifest.provenance.get("skipped", {})
    if skipped:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
        listed = features.attachment("skipped.jsonl")
        log_info(
            f"{features.folder}: {sum(skipped.values())} questions were left out ({reasons}); all of them: {listed}"
        )


def _check_annotations(features: FeatureReader, config: Config, split: str) -> None:
    """Notices an edit since the cache was made; annotations that are not on this machine are not needed."""
    made_of = features.manifest.provenance.get("sources", {}).get(split, {})
    files = config.data.splits.get(split)
    for key, sha256 in made_of.items():
        if files and _identity_now(files, key) not in (sha256, None):
            named = files.tables[key].dataset if key in files.tables else getattr(files, key)
            raise PipelineError(
                f"{named} (data.{split}.{key}) is not what {config.cache.dir} was made of. Run `pipe precompute` "
                "again: it renews the text, and encodes only pictures that are new"
            )


def _identity_now(files: SplitFiles, key: str) -> str | None:
    """What the manifest would have for these annotations now; None if they are not on this machine."""
    if key in files.tables:
        return identity(files.tables[key])
    path = getattr(files, key, None)
    return sha256_of(path) if path is not None and path.is_file() else None


def _log_other_images(features: FeatureReader, config: Config, split: str) -> None:
    """Of pictures elsewhere on this machine than those that were encoded; that they are not here is no difference."""
    made: dict[str, Any] = features.manifest.provenance.get("config", {}).get("data", {}).get(split) or {}
    encoded, given = made.get("images"), getattr(config.data.splits.get(split), "images", None)
    if (
        encoded
        and given
        and given.is_dir()
        and Path(encoded).is_absolute()
        and given.resolve() != Path(encoded).resolve()
    ):
        log_info(
            f"data.{split}.images is {given}; {features.folder} holds the pictures of {encoded}, and these are used"
        )


def check_lora(config: Config) -> None:
    """Raises `ConfigError` if the names in `lora.target_modules` do not fit the language model; none is loaded."""
    folder = fetch_checkpoint(config.model.checkpoint, config.model.revision, LANGUAGE_MODEL_PREFIXES)
    with torch.device("meta"):
        targets_of(Blip2LanguageHalf(Blip2Config.from_pretrained(folder)), config.lora.target_modules)


def load_base(config: Config, dropout: float | None = None) -> Blip2LanguageHalf:
    """The language half that `config` names, quantised and on this machine's device, without an adapter."""
    model, quantization = config.model, config.quantization
    device = pick_device()
    base = load_language_half(
        fetch_checkpoint(model.checkpoint, model.revision, LANGUAGE_MODEL_PREFIXES),
        device,
        pick_dtype(quantization.compute_dtype, device),
        quantization.bits,
        quantization.quant_type,
        quantization.double_quant,
        dropout,
    )
    base.name_or_path = public_name(model.checkpoint)  # an adapter's config names its base model by this
    return base


def load_tokenizer(config: Config) -> PromptTokenizer:
    folder = fetch_checkpoint(config.model.checkpoint, config.model.revision, LANGUAGE_MODEL_PREFIXES)
    return PromptTokenizer(folder, config.data.prompt)


def _check_features(features: FeatureReader, config: Config, folder: Path) -> None:
    found = features.spec
    made: dict[str, Any] = features.manifest.provenance.get("encoder", {})
    wanted = encoder_settings(folder)
    differences = [
        f"{key}: cache has {made[key]}, wanted {wanted[key]}"
        for key in wanted
        if made.get(key, wanted[key]) != wanted[key]
    ]
    known = ""
    if not has_half(folder, ENCODER_PREFIXES):
        known = found.encoder_fingerprint
        log_info(f"{folder}: the encoder's tensors are not on this machine; the cache is taken to be made from them")
    encoder_dtype = found.encoder_dtype if config.precompute.dtype == "auto" else config.precompute.dtype
    differences += found.diff(encoder_spec(folder, encoder_dtype, config.cache.dtype, known))
    if differences:
        raise PipelineError(
            f"{config.cache.dir}: the cache holds other features than this config makes:\n  "
            + "\n  ".join(differences)
            + "\nMend the config, or run `pipe precompute` with another cache.dir"
        )
