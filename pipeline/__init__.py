"""Fine-tune BLIP-2 for visual question answering with LoRA, from cached query features.

The functions are those that the commands call. Each name is imported when it is first used, so that importing the
package loads neither torch nor transformers.

    >>> import pipeline
    >>> config = pipeline.load_config("configs/easy_vqa.yaml", ["train.max_steps=20"])
    >>> pipeline.precompute(config)
    >>> run = pipeline.train(config)
    >>> pipeline.evaluate(run).accuracy
    >>> pipeline.Predictor(run).predict("image.png", "what shape is in the image?").answer
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# The following variables are read when torch is imported. Values that the user has set are kept.
#
# By default, idle OpenMP threads spin for milliseconds, and take the processor from the threads that decode images.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# On a CPU, oneDNN and torch each keep 1,024 prepared matrix products, one per shape. Micro-batches differ in length, so
# these caches would grow to 0.9 GB, and they save no time.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
os.environ.setdefault("LRU_CACHE_CAPACITY", "32")

if TYPE_CHECKING:
    from cache.reader import FeatureReader
    from cache.spec import CacheError
    from pipeline.answers.predictor import Prediction, Predictor
    from pipeline.batches.torch_dataset import CachedVQADataset
    from pipeline.commands.evaluate import EvaluateResult, evaluate
    from pipeline.commands.export import ExportResult, export
    from pipeline.commands.precompute import PrecomputeResult, precompute
    from pipeline.commands.report import ReportResult, report
    from pipeline.commands.train import TrainResult, train
    from pipeline.common.errors import ConfigError, PipelineError
    from pipeline.common.result import Result
    from pipeline.config import Config, load_config
    from pipeline.runs.run import Run

__all__ = [
    "CacheError",
    "CachedVQADataset",
    "Config",
    "ConfigError",
    "EvaluateResult",
    "ExportResult",
    "FeatureReader",
    "PipelineError",
    "PrecomputeResult",
    "Prediction",
    "Predictor",
    "ReportResult",
    "Result",
    "Run",
    "TrainResult",
    "evaluate",
    "export",
    "load_config",
    "precompute",
    "report",
    "train",
]

_MODULES = {
    "cache.reader": ("FeatureReader",),
    "cache.spec": ("CacheError",),
    "pipeline.answers.predictor": ("Prediction", "Predictor"),
    "pipeline.batches.torch_dataset": ("CachedVQADataset",),
    "pipeline.commands.evaluate": ("EvaluateResult", "evaluate"),
    "pipeline.commands.export": ("ExportResult", "export"),
    "pipeline.commands.precompute": ("PrecomputeResult", "precompute"),
    "pipeline.commands.report": ("ReportResult", "report"),
    "pipeline.commands.train": ("TrainResult", "train"),
    "pipeline.common.errors": ("ConfigError", "PipelineError"),
    "pipeline.common.result": ("Result",),
    "pipeline.config": ("Config", "load_config"),
    "pipeline.runs.run": ("Run",),
}
"""Names of the API by module."""


def __getattr__(name: str) -> Any:
    """Import a name of the API when it is first used."""
    module = next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline.common.compat import silence_optional_kernel_warning

    silence_optional_kernel_warning()
    globals()[name] = value = getattr(import_module(module), name)
    return value


def __dir__() -> list[str]:
    """List the API for completion."""
    return sorted({*globals(), *__all__})
