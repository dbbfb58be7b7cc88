"""Training a run: its folder, determinism, resuming, and refused inputs; evaluation of the result."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import files_of, with_train
from safetensors.torch import load_file

from cache.spec import CacheError
from pipeline.batches.sequences import ImageSequence, SequenceBuilder
from pipeline.blip2.language_model import Blip2LanguageHalf, add_lora, load_language_half
from pipeline.commands.evaluate import evaluate
from pipeline.commands.train import resolve_run, train, train_run
from pipeline.common.errors import ConfigError, PipelineError
from pipeline.config import Config, load_config
from pipeline.runs.checkpoints import COMPLETE_MARKER
from pipeline.runs.run import Run, next_run


def test_run_folder_holds_config_metrics_and_adapter(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    result = train_run(cached, run)
    assert (result.steps, result.questions, result.without_answer) == (4, 54, 0)
    assert result.run == str(run.path)
    assert load_config(run.config) == cached
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows)
    adapter = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["target_modules"]) == (16, 32, ["q_proj", "v_proj"])
    weights = load_file(run.adapter / "adapter_model.safetensors")
    assert "base_model.model.language_model.model.decoder.layers.0.self_attn.q_proj.lora_A.weight" in weights
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_training_needs_no_image_or_annotation_file(data_set: Path) -> None:
    from pipeline.commands.precompute import precompute

    config = load_config(data_set / "config.yaml")
    precompute(config)
    shutil.rmtree(data_set / "images")
    for split in ("train", "val"):
        (data_set / f"{split}.jsonl").unlink()
    run = Run(data_set / "run")
    train_run(config, run)
    assert evaluate(run).questions == 18


def test_loss_decreases(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    train_run(with_train(cached, max_steps=30, batch_size=18, learning_rate=5e-3), run)
    losses = [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_training_is_deterministic_across_processes(cached: Config, tmp_path: Path) -> None:
    """The hash seed changes the order of sets of strings; the adapter's files must not depend on it."""
    (tmp_path / "config.yaml").write_text(cached.to_yaml())
    code = (
        "import sys; from pathlib import Path; from pipeline.config import load_config;"
        "from pipeline.runs.run import Run; from pipeline.commands.train import train_run;"
        "train_run(load_config(Path(sys.argv[1])), Run(Path(sys.argv[2])))"
    )
    for name, hash_seed in (("a", "1"), ("b", "2")):
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "config.yaml"), str(tmp_path / name)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
        )
    first, second = (files_of(tmp_path / name / "adapter") for name in ("a", "b"))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= first.keys()
    assert first == second


def test_seed_changes_the_adapter(cached: Config, tmp_path: Path) -> None:
    adapters = []
    for seed in (0, 1):
        run = Run(tmp_path / str(seed))
        train_run(with_train(cached, seed=seed), run)
        adapters.append((run.adapter / "adapter_model.safetensors").read_bytes())
    assert adapters[0] != adapters[1]


def test_killed_run_resumes_to_the_same_adapter(cached: Config, tmp_path: Path) -> None:
    whole, killed = Run(tmp_path / "whole"), Run(tmp_path / "killed")
    config = with_train(cached, max_steps=8)
    train_run(config, whole)
    build_sequences, batches = SequenceBuilder.for_training, []

    def interrupt_at_batch_6(self: SequenceBuilder, questions: list[int], *args: object) -> list[ImageSequence]:
        batches.append(questions)
        if len(batches) == 6:
            raise KeyboardInterrupt
        return build_sequences(self, questions, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceBuilder, "for_training", interrupt_at_batch_6)
        with pytest.raises(KeyboardInterrupt):
            train_run(config, killed)
    assert not killed.adapter.exists()
    with pytest.raises(PipelineError, match="has no adapter yet; resume it: `pipe train"):
        evaluate(killed)
    with pytest.raises(PipelineError, match=r"started with other settings:\n  train.learning_rate: 0.5, not 0.001"):
        train_run(with_train(config, learning_rate=0.5), killed, resume=True)
    train_run(config, killed, resume=True)
    name = "adapter_model.safetensors"
    assert [json.loads(line)["step"] for line in killed.metrics.read_text().splitlines()] == list(range(1, 9))
    with pytest.raises(PipelineError, match="finished already"):
        train_run(config, killed, resume=True)
    longer = rf"finished already(.|\n)*: pipe train {killed.config} train.max_steps=20 --name ANOTHER"
    with pytest.raises(PipelineError, match=longer):
        train_run(with_train(config, max_steps=20), killed, resume=True)
    assert (killed.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()


def test_incomplete_checkpoint_is_not_used(cached: Config, tmp_path: Path) -> None:
    config, run, whole = with_train(cached, max_steps=8), Run(tmp_path / "run"), Run(tmp_path / "whole")
    train_run(config, whole)
    train_run(config, run)
    shutil.rmtree(run.adapter)
    newest = run.last_checkpoint()
    assert newest is not None
    assert newest.name == "checkpoint-8"
    (newest / COMPLETE_MARKER).unlink()  # killed before the last file was written
    (newest / "optimizer.pt").write_bytes(b"cut")
    with run.metrics.open("a") as file:
        file.write('{"step": 9, "lo')
    train_run(config, run, resume=True)
    name = "adapter_model.safetensors"
    assert (run.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()
    assert len(run.metrics.read_text().splitlines()) == 8


def test_resume_accepts_settings_that_do_not_affect_the_result(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    train_run(cached, run)
    shutil.rmtree(run.adapter)
    other = with_train(cached, logging_steps=3, save_steps=7)
    train_run(other.model_copy(update={"cache": cached.cache.model_copy(update={"io": "pread"})}), run, resume=True)
    assert run.adapter.is_dir()


def test_bfloat16_model_trains_and_evaluates(cached: Config, tmp_path: Path) -> None:
    quantization = cached.quantization.model_copy(update={"compute_dtype": "bfloat16"})
    run = Run(tmp_path / "run")
    config = with_train(cached, max_steps=2, batch_size=2)
    assert train_run(config.model_copy(update={"quantization": quantization}), run).train_loss < 10
    weights = load_file(run.adapter / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert evaluate(run, ("evaluate.max_new_tokens=2",)).questions == 18


def test_trained_weights_of_a_float16_model_are_float32(cached: Config, checkpoint: Path) -> None:
    base = load_language_half(checkpoint, torch.device("cpu"), torch.float16)
    model = add_lora(base, 4, 8, 0.0, ("q_proj", "v_proj"), "all")
    assert base.language_projection.weight.dtype == torch.float16
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}


def test_question_too_long_with_another_prompt_is_an_error(cached: Config, tmp_path: Path) -> None:
    """Stage one checks its own prompt; a prompt that is changed later is checked by stage two."""
    prompt = "what " * 250 + "{question}"
    config = cached.model_copy(update={"data": cached.data.model_copy(update={"prompt": prompt})})
    with pytest.raises(PipelineError, match=r"question \d+ of train is \d+ tokens long .* has 256"):
        train_run(config, Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_damaged_adapter_is_an_error(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    train_run(cached, run)
    (run.adapter / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(PipelineError, match=r"adapter_model.safetensors: damaged, .* To restore it"):
        evaluate(run)


def test_official_metric_needs_several_references(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    train_run(cached, run)
    with pytest.raises(PipelineError, match=r"set evaluate\.metric=exact"):
        evaluate(run, ("evaluate.metric=official",))


def test_resume_without_a_checkpoint_starts_at_the_first_step(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceBuilder, "for_training", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_run(cached, run)
    assert train_run(cached, run, resume=True).steps == 4


def test_run_can_be_evaluated_from_any_folder(cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cached.cache.dir.parent)
    run = Run(tmp_path / "run")
    train_run(cached.model_copy(update={"cache": cached.cache.model_copy(update={"dir": Path("cache")})}), run)
    monkeypatch.chdir(tmp_path)
    assert evaluate(Run(Path("run"))).questions == 18


def test_existing_folder_is_not_changed(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.path.mkdir()
    (run.path / "notes.txt").write_text("mine")
    with pytest.raises(PipelineError, match="this run exists already; choose another --name"):
        train_run(cached, run)
    with pytest.raises(PipelineError, match="nothing to resume"):
        train_run(cached, run, resume=True)
    assert files_of(run.path) == {"notes.txt": b"mine"}


def test_next_run_uses_the_next_free_number(tmp_path: Path) -> None:
    (tmp_path / "mine-1").mkdir()
    assert next_run(tmp_path, "mine").path == tmp_path / "mine-2"


def test_train_by_name_numbers_and_resumes_runs(cached: Config, tmp_path: Path) -> None:
    config = with_train(cached, max_steps=1, output_dir=tmp_path / "runs")
    first, named = train(config), train(config, name="mine")
    assert first is not None
    assert named is not None
    assert Run.of(first).path == tmp_path / "runs" / f"{config.cache.dir.name}-1"
    run = Run.of(named)
    assert run.path == tmp_path / "runs" / "mine"
    before = files_of(run.adapter)
    shutil.rmtree(run.adapter)
    resumed = train(config, name="mine", resume=True)
    assert resumed is not None
    assert resumed.run == named.run
    assert files_of(run.adapter) == before
    with pytest.raises(ConfigError, match="needs the name of the run"):
        train(config, resume=True)
    with pytest.raises(ConfigError, match="not a plain folder name"):
        train(config, name="../mine")


def test_arguments_of_pipe_train_resolve_to_a_config_and_a_run(cached: Config, tmp_path: Path) -> None:
    source, runs = tmp_path / "mine.yaml", tmp_path / "runs"
    source.write_text(with_train(cached, output_dir=runs).to_yaml())
    config, run = resolve_run(source, ("train.seed=7",))
    assert (config.train.seed, run) == (7, Run(runs / "mine-1"))
    assert resolve_run(source, name="a")[1] == resolve_run(source, name="a", resume=True)[1] == Run(runs / "a")
    run.write_config(config)
    assert resolve_run(run.path, resume=True) == (config, run)
    with pytest.raises(ConfigError, match="--resume needs a run: give its folder in place of CONFIG, or its --name"):
        resolve_run(source, resume=True)


@pytest.mark.parametrize("source", [Run(Path("runs/a")), "runs/a", Path("runs/a"), SimpleNamespace(run="runs/a")])
def test_run_of_accepts_a_run_a_path_or_a_result(source: Any) -> None:
    assert Run.of(source) == Run(Path("runs/a"))


def test_failed_start_removes_only_the_folders_it_created(cached: Config, tmp_path: Path) -> None:
    config = cached.model_copy(update={"cache": cached.cache.model_copy(update={"dir": tmp_path / "none"})})
    (tmp_path / "mine").mkdir()
    for parent in (tmp_path / "new" / "runs", tmp_path / "mine"):
        with pytest.raises(CacheError):
            train_run(config, Run(parent / "run"))
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_missing_cache_leaves_no_run_folder(cached: Config, tmp_path: Path) -> None:
    config = cached.model_copy(update={"cache": cached.cache.model_copy(update={"dir": tmp_path / "none"})})
    with pytest.raises(CacheError, match=r"no cache at .*\. Run `pipe precompute` first"):
        train_run(config, Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_unknown_target_module_is_an_error(cached: Config, tmp_path: Path) -> None:
    config = cached.model_copy(update={"lora": cached.lora.model_copy(update={"target_modules": ("query",)})})
    with pytest.raises(PipelineError, match=r"lora.target_modules: 'query' matches nothing in the language model"):
        train_run(config, Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_warmup_longer_than_the_training_is_logged(
    cached: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_run(with_train(cached, warmup_steps=4), Run(tmp_path / "long"))
    assert "train.warmup_steps is 4, but training has 4 steps: the learning rate never reaches 0.001" in (
        capsys.readouterr().err
    )
    train_run(with_train(cached, warmup_steps=2), Run(tmp_path / "short"))
    assert "train.warmup_steps" not in capsys.readouterr().err


def test_fsdp_is_an_error(cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(PipelineError, match="FSDP and DeepSpeed are not supported"):
        train_run(cached, Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_divergence_is_an_error_with_advice(cached: Config, tmp_path: Path) -> None:
    config = with_train(cached, learning_rate=1e30, warmup_steps=0, max_grad_norm=0.0, max_steps=20)
    with pytest.raises(PipelineError, match=r"training diverged at step \d+: loss .* Try a lower train.learning_rate"):
        train_run(config, Run(tmp_path / "run"))


def test_evaluation_writes_the_official_results_format(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    train_run(cached, run)
    with_adapter, without = evaluate(run), evaluate(run, with_adapter=False)
    assert with_adapter.results != without.results
    rows = json.loads(Path(with_adapter.results).read_text())
    assert [set(row) for row in rows] == [{"question_id", "answer"}] * 18
    assert [row["question_id"] for row in rows] == list(range(1, 19))
    right = [json.loads(line)["answer"] for line in (cached.cache.dir.parent / "val.jsonl").read_text().splitlines()]
    hits = sum(row["answer"] == answer for row, answer in zip(rows, right, strict=True))
    assert with_adapter.accuracy == pytest.approx(100 * hits / 18)
    assert (with_adapter.questions, with_adapter.scored, with_adapter.metric) == (18, 18, "exact")


def test_beams_and_batch_size_can_be_overridden_at_evaluation(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    train_run(cached, run)
    one = evaluate(run, ("evaluate.batch_size=1",))
    answers = Path(one.results).read_text()
    many = evaluate(run, ("evaluate.batch_size=18",))
    assert Path(many.results).read_text() == answers
    beams = []
    with pytest.MonkeyPatch.context() as patch:
        generate = Blip2LanguageHalf.generate
        patch.setattr(Blip2LanguageHalf, "generate", lambda *a, **k: beams.append(k["num_beams"]) or generate(*a, **k))
        assert evaluate(run, ("evaluate.num_beams=3",)).questions == 18
    assert beams == [3]
