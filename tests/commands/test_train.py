import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import files_of, with_train
from safetensors.torch import load_file

from cache.spec import CacheError
from pipeline.batches.sequences import ImageSequence, SequenceBuilder
from pipeline.blip2.language_model import Blip2LanguageHalf, add_lora, load_language_half
from pipeline.commands.evaluate import evaluate
from pipeline.commands.train import train
from pipeline.common.errors import PipelineError
from pipeline.config import Config, load_config
from pipeline.runs.run import Run, next_run


def test_a_run_folder_holds_config_metrics_and_adapter(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    summary = train(cached, run)
    assert (summary["steps"], summary["questions"], summary["without_answer"]) == (4, 54, 0)
    assert summary["run"] == str(run.path)
    assert load_config(run.config) == cached
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows)
    adapter = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["target_modules"]) == (16, 32, ["q_proj", "v_proj"])
    weights = load_file(run.adapter / "adapter_model.safetensors")
    assert "base_model.model.language_model.model.decoder.layers.0.self_attn.q_proj.lora_A.weight" in weights
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_training_needs_no_picture_and_no_annotation_file(data_set: Path) -> None:
    from pipeline.commands.precompute import precompute

    config = load_config(data_set / "config.yaml")
    precompute(config)
    shutil.rmtree(data_set / "images")
    for split in ("train", "val"):
        (data_set / f"{split}.jsonl").unlink()
    run = Run(data_set / "run")
    train(config, run)
    assert evaluate(run).questions == 18


def test_the_loss_falls(cached: Config, tmp_path: Path) -> None:
    summary_path = Run(tmp_path / "run")
    train(with_train(cached, max_steps=30, batch_size=18, learning_rate=5e-3), summary_path)
    losses = [json.loads(line)["loss"] for line in summary_path.metrics.read_text().splitlines()]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_same_config_cache_and_seed_give_the_same_adapter_in_another_process(cached: Config, tmp_path: Path) -> None:
    """A set of strings is ordered by the process's hash seed: nothing of the adapter's files may follow it."""
    (tmp_path / "config.yaml").write_text(cached.to_yaml())
    code = (
        "import sys; from pathlib import Path; from pipeline.config import load_config;"
        "from pipeline.runs.run import Run; from pipeline.commands.train import train;"
        "train(load_config(Path(sys.argv[1])), Run(Path(sys.argv[2])))"
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


def test_another_seed_gives_another_adapter(cached: Config, tmp_path: Path) -> None:
    adapters = []
    for seed in (0, 1):
        run = Run(tmp_path / str(seed))
        train(with_train(cached, seed=seed), run)
        adapters.append((run.adapter / "adapter_model.safetensors").read_bytes())
    assert adapters[0] != adapters[1]


def test_a_killed_run_resumes_to_the_same_adapter(cached: Config, tmp_path: Path) -> None:
    whole, killed = Run(tmp_path / "whole"), Run(tmp_path / "killed")
    config = with_train(cached, max_steps=8)
    train(config, whole)
    build_sequences, batches = SequenceBuilder.for_training, []

    def stop_at_the_sixth(self: SequenceBuilder, questions: list[int], *how: object) -> list[ImageSequence]:
        batches.append(questions)
        if len(batches) == 6:
            raise KeyboardInterrupt
        return build_sequences(self, questions, *how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceBuilder, "for_training", stop_at_the_sixth)
        with pytest.raises(KeyboardInterrupt):
            train(config, killed)
    assert not killed.adapter.exists()
    with pytest.raises(PipelineError, match="has no adapter yet; go on with it by"):
        evaluate(killed)
    with pytest.raises(PipelineError, match=r"started with other settings:\n  train.learning_rate: 0.5, not 0.001"):
        train(with_train(config, learning_rate=0.5), killed, resume=True)
    train(config, killed, resume=True)
    name = "adapter_model.safetensors"
    assert [json.loads(line)["step"] for line in killed.metrics.read_text().splitlines()] == list(range(1, 9))
    with pytest.raises(PipelineError, match="finished already"):
        train(config, killed, resume=True)
    longer = rf"finished already(.|\n)*: pipe train {killed.config} train.max_steps=20 --name ANOTHER"
    with pytest.raises(PipelineError, match=longer):
        train(with_train(config, max_steps=20), killed, resume=True)
    assert (killed.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()


def test_a_checkpoint_half_written_is_never_resumed_from(cached: Config, tmp_path: Path) -> None:
    config, run, whole = with_train(cached, max_steps=8), Run(tmp_path / "run"), Run(tmp_path / "whole")
    train(config, whole)
    train(config, run)
    shutil.rmtree(run.adapter)
    newest = run.last_checkpoint()
    assert newest is not None
    assert newest.name == "checkpoint-8"
    (newest / "whole").unlink()  # the kill came before the last file
    (newest / "optimizer.pt").write_bytes(b"cut")
    with run.metrics.open("a") as file:
        file.write('{"step": 9, "lo')
    train(config, run, resume=True)
    name = "adapter_model.safetensors"
    assert (run.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()
    assert len(run.metrics.read_text().splitlines()) == 8


def test_resume_takes_settings_that_train_nothing_else(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    train(cached, run)
    shutil.rmtree(run.adapter)
    other = with_train(cached, logging_steps=3, save_steps=7)
    train(other.model_copy(update={"cache": cached.cache.model_copy(update={"io": "pread"})}), run, resume=True)
    assert run.adapter.is_dir()


def test_a_bfloat16_model_trains_and_answers(cached: Config, tmp_path: Path) -> None:
    quantization = cached.quantization.model_copy(update={"compute_dtype": "bfloat16"})
    run = Run(tmp_path / "run")
    config = with_train(cached, max_steps=2, batch_size=2)
    assert train(config.model_copy(update={"quantization": quantization}), run)["train_loss"] < 10
    weights = load_file(run.adapter / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert evaluate(run, ("evaluate.max_new_tokens=2",)).questions == 18


def test_what_is_trained_is_float32_on_a_float16_model(cached: Config, checkpoint: Path) -> None:
    base = load_language_half(checkpoint, torch.device("cpu"), torch.float16)
    model = add_lora(base, 4, 8, 0.0, ("q_proj", "v_proj"), "all")
    assert base.language_projection.weight.dtype == torch.float16
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}


def test_a_question_that_another_prompt_makes_too_long_is_named(cached: Config, tmp_path: Path) -> None:
    """Stage one has no room for longer ones; a prompt that only stage two is given is checked there."""
    prompt = "what " * 250 + "{question}"
    config = cached.model_copy(update={"data": cached.data.model_copy(update={"prompt": prompt})})
    with pytest.raises(PipelineError, match=r"question \d+ of train is \d+ tokens long .* takes 256"):
        train(config, Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_damaged_adapter_is_told(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    train(cached, run)
    (run.adapter / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(PipelineError, match=r"adapter_model.safetensors: damaged, .* To make it again"):
        evaluate(run)


def test_the_official_accuracy_of_single_answers_is_refused(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    train(cached, run)
    with pytest.raises(PipelineError, match=r"set evaluate\.metric=exact"):
        evaluate(run, ("evaluate.metric=official",))


def test_a_run_that_died_before_its_first_checkpoint_starts_anew(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceBuilder, "for_training", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(cached, run)
    assert train(cached, run, resume=True)["steps"] == 4


def test_a_run_is_evaluated_from_any_folder(cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cached.cache.dir.parent)
    run = Run(tmp_path / "run")
    train(cached.model_copy(update={"cache": cached.cache.model_copy(update={"dir": Path("cache")})}), run)
    monkeypatch.chdir(tmp_path)
    assert evaluate(Run(Path("run"))).questions == 18


def test_a_run_folder_that_exists_is_left_alone(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.path.mkdir()
    (run.path / "notes.txt").write_text("mine")
    with pytest.raises(PipelineError, match="this run exists already; give another --name"):
        train(cached, run)
    with pytest.raises(PipelineError, match="nothing to resume"):
        train(cached, run, resume=True)
    assert files_of(run.path) == {"notes.txt": b"mine"}


def test_runs_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "mine-1").mkdir()
    assert next_run(tmp_path, "mine").path == tmp_path / "mine-2"


def test_a_cache_that_is_not_there_leaves_no_run_behind(cached: Config, tmp_path: Path) -> None:
    config = cached.model_copy(update={"cache": cached.cache.model_copy(update={"dir": tmp_path / "none"})})
    with pytest.raises(CacheError, match=r"no cache at .*: run `pipe precompute` first"):
        train(config, Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_target_modules_that_opt_lacks_are_told(cached: Config, tmp_path: Path) -> None:
    config = cached.model_copy(update={"lora": cached.lora.model_copy(update={"target_modules": ("query",)})})
    with pytest.raises(PipelineError, match=r"lora.target_modules: 'query' matches nothing in the language model"):
        train(config, Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_warm_up_longer_than_the_training_is_told(
    cached: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(with_train(cached, warmup_steps=4), Run(tmp_path / "long"))
    assert "train.warmup_steps is 4 and the training has 4: the learning rate does not get to 0.001" in (
        capsys.readouterr().err
    )
    train(with_train(cached, warmup_steps=2), Run(tmp_path / "short"))
    assert "warmup" not in capsys.readouterr().err


def test_sharded_weights_are_refused(cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(PipelineError, match="training shards no weights"):
        train(cached, Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_diverging_training_stops_and_says_what_to_try(cached: Config, tmp_path: Path) -> None:
    config = with_train(cached, learning_rate=1e30, warmup_steps=0, max_grad_norm=0.0, max_steps=20)
    with pytest.raises(PipelineError, match=r"training diverged at step \d+: loss .* Try a lower train.learning_rate"):
        train(config, Run(tmp_path / "run"))


def test_evaluation_writes_the_official_results_form(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    train(cached, run)
    with_adapter, without = evaluate(run), evaluate(run, with_adapter=False)
    assert with_adapter.results != without.results
    rows = json.loads(Path(with_adapter.results).read_text())
    assert [set(row) for row in rows] == [{"question_id", "answer"}] * 18
    assert [row["question_id"] for row in rows] == list(range(1, 19))
    right = [json.loads(line)["answer"] for line in (cached.cache.dir.parent / "val.jsonl").read_text().splitlines()]
    hits = sum(row["answer"] == answer for row, answer in zip(rows, right, strict=True))
    assert with_adapter.accuracy == pytest.approx(100 * hits / 18)
    assert (with_adapter.questions, with_adapter.scored, with_adapter.metric) == (18, 18, "exact")


def test_beams_and_batch_size_are_overridden_at_evaluation(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    train(cached, run)
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
