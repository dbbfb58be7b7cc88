"""What a run was made of, and the adapter's card."""

import json
from pathlib import Path

import pytest

from pipeline.commands.evaluate import evaluate
from pipeline.commands.train import train
from pipeline.config import Config
from pipeline.runs.run import Run


def test_the_record_and_the_card_tell_what_came_out(cached: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    summary = train(cached, run)
    record = json.loads(run.record.read_text())
    assert record["summary"] == summary
    assert record["cache"]["questions"] == {"train": 54, "val": 18}
    card = (run.adapter / "README.md").read_text()
    assert f"| fingerprint | `{record['cache']['fingerprint']}` |" in card
    assert "none yet" in card
    accuracy = evaluate(run).accuracy
    assert f"| val, with the adapter | {accuracy:.2f} (" in (run.adapter / "README.md").read_text()


def test_a_training_killed_before_its_card_is_resumed_and_has_one(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.commands.train.write_card", lambda *_: exit())
        with pytest.raises(SystemExit):
            train(cached, run)
    assert not run.adapter.exists(), "an adapter without its card is not finished"
    train(cached, run, resume=True)
    evaluate(run)
    assert "| val, with the adapter | " in (run.adapter / "README.md").read_text()
    assert json.loads(run.record.read_text())["summary"]["steps"] == 4
