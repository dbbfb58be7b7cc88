"""The Python API: its names, their import when first used, and all stages on a small dataset."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from data_set import write_config, write_data_set
from PIL import Image

import pipeline
from pipeline import cli

QUESTION = "what shape is it?"
MEASURED = {"seconds", "seconds_training", "images_per_second", "questions_per_second", "peak_memory_bytes", "time"}
"""Keys whose values differ between two runs of a command."""


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return done.stdout.strip()


def test_import_loads_no_large_library() -> None:
    code = "import sys, pipeline; dir(pipeline); print({'torch', 'transformers', 'numpy', 'pydantic'} & {*sys.modules})"
    assert run_python(code) == "set()"


def test_import_sets_variables_that_torch_reads_and_keeps_those_of_the_user() -> None:
    code = "import os, pipeline; print(os.environ['LRU_CACHE_CAPACITY'], os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])"
    assert run_python(code, LRU_CACHE_CAPACITY="7", ONEDNN_PRIMITIVE_CACHE_CAPACITY="9") == "7 9"
    unset = "import os; [os.environ.pop(name, None) for name in [*os.environ] if name.endswith('CACHE_CAPACITY')]; "
    assert run_python(unset + code) == "32 32"


@pytest.mark.parametrize("name", pipeline.__all__)
def test_name_is_importable_and_documented(name: str) -> None:
    assert name in dir(pipeline)
    assert getattr(pipeline, name).__doc__


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'nothing'"):
        pipeline.nothing  # noqa: B018


def test_type_checkers_see_the_names_that_are_imported_when_first_used() -> None:
    tree = ast.parse(Path(str(pipeline.__file__)).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    declared = {node.module: tuple(alias.name for alias in node.names) for node in imports}
    assert declared == pipeline._MODULES
    assert sorted(name for names in declared.values() for name in names) == sorted(pipeline.__all__)


@dataclass(frozen=True)
class Job:
    """A config, its finished cache, and a run."""

    path: Path
    config: Any
    precomputed: Any
    trained: Any


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("api")
    write_data_set(folder)
    path = write_config(folder)
    config = pipeline.load_config(path, ["train.max_steps=2"])
    return Job(path, config, pipeline.precompute(config), pipeline.train(config, name="first"))


def test_results_have_the_keys_of_the_summary_as_attributes(job: Job) -> None:
    assert isinstance(job.precomputed, pipeline.PrecomputeResult)
    assert (job.precomputed.images, job.precomputed.encoded, job.precomputed.failed) == (24, 24, 0)
    assert isinstance(job.trained, pipeline.TrainResult)
    assert job.trained.steps == 2
    assert Path(job.trained.run) == job.config.train.output_dir / "first"
    for result in (job.precomputed, job.trained):
        assert {field.name for field in fields(result)} == result.to_dict().keys()
        json.dumps(result.to_dict())


def test_config_from_a_dict_equals_that_from_a_file(job: Job) -> None:
    assert pipeline.load_config(json.loads(job.path.read_text()), ["train.max_steps=2"]) == job.config


def test_evaluate_takes_a_result_a_path_or_a_run(job: Job) -> None:
    by_result = pipeline.evaluate(job.trained)
    assert isinstance(by_result, pipeline.EvaluateResult)
    assert by_result.questions == 18
    assert by_result.accuracy is not None
    assert 0 <= by_result.accuracy <= 100
    for run in (job.trained.run, Path(job.trained.run), pipeline.Run(job.trained.run)):
        other = pipeline.evaluate(run)
        assert (other.accuracy, other.per_answer_type) == (by_result.accuracy, by_result.per_answer_type)
    assert pipeline.evaluate(job.trained, ["evaluate.split=train"], with_adapter=False).questions == 54


def test_to_dict_is_what_json_prints(job: Job) -> None:
    run = job.trained.run
    calls = [
        (["precompute", str(job.path)], lambda: pipeline.precompute(job.config)),
        (["evaluate", run], lambda: pipeline.evaluate(run)),
        (["report", run], lambda: pipeline.report([run])),
    ]
    for arguments, call in calls:
        done = CliRunner().invoke(cli.main, [*arguments, "--json"])
        assert done.exit_code == 0, done.stderr
        printed, returned = json.loads(done.stdout), json.loads(json.dumps(call().to_dict()))
        assert printed.keys() == returned.keys() | {"seconds"}
        assert without_measurements(printed) == without_measurements(returned)


def without_measurements(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key not in MEASURED}


def test_predictor_takes_a_path_or_an_image(job: Job) -> None:
    image = job.path.parent / "images" / "3.png"
    predictor = pipeline.Predictor(job.trained)
    prediction = predictor.predict(image, QUESTION)
    assert isinstance(prediction, pipeline.Prediction)
    assert (prediction.question, prediction.image) == (QUESTION, str(image))
    assert prediction.answer
    assert 0 < prediction.probability <= 1
    from_memory = predictor.predict(Image.open(image), QUESTION)
    assert (from_memory.answer, from_memory.image) == (prediction.answer, None)
    assert pipeline.Predictor(job.trained.run, with_adapter=False).predict(str(image), QUESTION).answer


def test_report_and_export_write_their_files(job: Job, tmp_path: Path) -> None:
    report = pipeline.report([job.trained], output=tmp_path / "report.html")
    assert (report.runs, Path(report.report)) == (1, tmp_path / "report.html")
    assert Path(report.report).stat().st_size == report.bytes
    exported = pipeline.export(job.trained, tmp_path / "adapter")
    assert (exported.merged, exported.url) == (False, None)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_feature_reader_reads_the_cache(job: Job) -> None:
    with pipeline.FeatureReader(job.config.cache.dir) as features:
        rows = features.gather([0, 23])
    assert rows.shape[0] == 2
    assert rows.shape[2] == 128


def test_errors_are_those_of_the_command(job: Job, tmp_path: Path) -> None:
    with pytest.raises(pipeline.ConfigError, match="did you mean epochs"):
        pipeline.load_config(job.path, ["train.epochz=1"])
    with pytest.raises(pipeline.PipelineError, match="not a run folder"):
        pipeline.evaluate(tmp_path)
    with pytest.raises(pipeline.CacheError):
        pipeline.FeatureReader(tmp_path)
