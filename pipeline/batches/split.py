"""Opens one split of a cache, after checking that it was made by the given config."""

from pathlib import Path
from typing import Any

from cache.files import sha256_of
from cache.reader import FeatureReader
from pipeline.batches.sequences import SequenceBuilder
from pipeline.blip2.checkpoint import ENCODER_PREFIXES, LANGUAGE_MODEL_PREFIXES, fetch_checkpoint, has_half
from pipeline.common.errors import PipelineError
from pipeline.common.progress import log_info
from pipeline.config import Config, SplitFiles
from pipeline.data.in_memory import is_in_memory
from pipeline.data.sequence_length import check_answer_lengths, check_lengths
from pipeline.data.tables import table_fingerprint
from pipeline.data.text import PromptTokenizer, retokenize
from pipeline.encoding.encoder_spec import encoder_settings, encoder_spec


def open_split(
    config: Config,
    split: str,
    features: FeatureReader | None = None,
    trained: bool = True,
    answered: bool = False,
) -> SequenceBuilder:
    """Open one split of the cache that `config` names.

    If the prompt or the tokenizer has changed since the cache was made, the cached text is tokenized again.

    Args:
        config: config of the run.
        split: name of the split.
        features: the cache, if it is open and checked already.
        trained: check that each question and its target fit into the language model.
        answered: check that each question and `evaluate.max_new_tokens` fit.

    Raises:
        CacheError: there is no complete cache.
        PipelineError: the cache was made with other settings (each difference is listed), or a question is too long.
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
    if (text.prompt, text.tokenizer) != (tokenizer.prompt, tokenizer.fingerprint()):
        log_info(f"{config.cache.dir}: the prompt or the tokenizer has changed; tokenizing {split} again")
        text = retokenize(text, tokenizer)
    if trained:
        check_lengths(text, tokenizer, split)
    if answered:
        check_answer_lengths(text, tokenizer, split, config.evaluate.max_new_tokens)
    return SequenceBuilder(features, text)


def load_tokenizer(config: Config) -> PromptTokenizer:
    """Load the tokenizer of the checkpoint that `config` names, with its prompt."""
    folder = fetch_checkpoint(config.model.checkpoint, config.model.revision, LANGUAGE_MODEL_PREFIXES)
    return PromptTokenizer(folder, config.data.prompt)


def _check_features(features: FeatureReader, config: Config, folder: Path) -> None:
    """Raise `PipelineError` if `config` would compute other features than those in the cache."""
    spec = features.spec
    cached: dict[str, Any] = features.manifest.provenance.get("encoder", {})
    expected = encoder_settings(folder)
    differences = [
        f"{key}: cache has {cached[key]}, wanted {expected[key]}"
        for key in expected
        if cached.get(key, expected[key]) != expected[key]
    ]
    known_fingerprint = ""
    if not has_half(folder, ENCODER_PREFIXES):
        known_fingerprint = spec.encoder_fingerprint
        log_info(f"{folder}: the encoder's weights are not on this machine; assuming that the cache was made from them")
    encoder_dtype = spec.encoder_dtype if config.precompute.dtype == "auto" else config.precompute.dtype
    differences += spec.diff(encoder_spec(folder, encoder_dtype, config.cache.dtype, known_fingerprint))
    if differences:
        raise PipelineError(
            f"{config.cache.dir}: the cache holds other features than this config computes:\n  "
            + "\n  ".join(differences)
            + "\nFix the config, or run `pipe precompute` with another cache.dir"
        )


def _check_annotations(features: FeatureReader, config: Config, split: str) -> None:
    """Raise `PipelineError` if annotations have changed since the cache was made.

    Annotations that are not on this machine are not needed, and not checked.
    """
    sources = features.manifest.provenance.get("sources", {})
    fingerprints, files = sources.get(split, {}), config.data.splits.get(split)
    if files and is_in_memory(sources, split):
        log_info(f"{config.cache.dir}: the split {split} was passed from Python, and data.{split} is not used")
        return
    for key, cached in fingerprints.items():
        if files and _fingerprint(files, key) not in (cached, None):
            source = files.tables[key].dataset if key in files.tables else getattr(files, key)
            raise PipelineError(
                f"{source} (data.{split}.{key}) has changed since {config.cache.dir} was made. Run `pipe precompute` "
                "again: it updates the text and encodes only new images"
            )


def _fingerprint(files: SplitFiles, key: str) -> str | None:
    """Return the current fingerprint of annotations as the manifest records it, or None if they are not here."""
    if key in files.tables:
        return table_fingerprint(files.tables[key])
    path = getattr(files, key, None)
    return sha256_of(path) if path is not None and path.is_file() else None


def _log_skipped(features: FeatureReader) -> None:
    skipped: dict[str, int] = features.manifest.provenance.get("skipped", {})
    if skipped:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
        path = features.attachment("skipped.jsonl")
        log_info(f"{features.folder}: {sum(skipped.values())} questions were skipped ({reasons}); full list: {path}")


def _log_other_images(features: FeatureReader, config: Config, split: str) -> None:
    """Log that the config names another image folder than the one encoded; the cache is used in any case."""
    cached: dict[str, Any] = features.manifest.provenance.get("config", {}).get("data", {}).get(split) or {}
    encoded, configured = cached.get("images"), getattr(config.data.splits.get(split), "images", None)
    if (
        encoded
        and configured
        and configured.is_dir()
        and Path(encoded).is_absolute()
        and configured.resolve() != Path(encoded).resolve()
    ):
        log_info(
            f"data.{split}.images is {configured}, but {features.folder} holds the images of {encoded}; using these"
        )
