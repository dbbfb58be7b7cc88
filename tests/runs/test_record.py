"""The record of a run and the model card of its adapter."""

import json
from pathlib import Path

import pytest

from pipeline.commands.evaluate import evaluate
from pipeline.commands.train import train_run
from pipeline.config import Config
from pipeline.runs.run import Run


def test_record_and_card_hold_the_results(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    result = train_run(cached, run)
    assert result is not None
    record = json.loads(run.record.read_text())
    assert record["summary"] == result.to_dict()
    assert record["cache"]["questions"] == {"train": 54, "val": 18}
    card = (run.adapter / "README.md").read_text()
    assert f"| fingerprint | `{record['cache']['fingerprint']}` |" in card
    assert "none yet" in card
    accuracy = evaluate(run).accuracy
    assert f"| val, with the adapter | {accuracy:.2f} (" in (run.adapter / "README.md").read_text()


def test_training_killed_before_the_card_is_written_can_be_resumed(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.commands.train.write_card", lambda *_: exit())
        with pytest.raises(SystemExit):
            train_run(cached, run)
    assert not run.adapter.exists(), "the card is written before the adapter is moved into place"
    train_run(cached, run, resume=True)
    evaluate(run)
    assert "| val, with the adapter | " in (run.adapter / "README.md").read_text()
    assert json.loads(run.record.read_text())["summary"]["steps"] == 4
