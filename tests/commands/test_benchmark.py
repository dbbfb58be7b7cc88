"""`pipe benchmark` on the smallest size, and the operations that it counts."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from pipeline.batches.random_questions import make_questions, sequences_of
from pipeline.blip2.random_checkpoint import config_of
from pipeline.cli import main
from pipeline.commands.benchmark import count_operations

BIG = "blip2-opt-2.7b"


def test_questions_have_the_statistics_of_vqav2() -> None:
    questions = make_questions(20_000, config_of(BIG))
    assert len(questions) / len({one.image for one in questions}) == pytest.approx(5.36, rel=0.02)
    assert np.mean([len(one.prompt) for one in questions]) == pytest.approx(5 + 7.2, rel=0.02)
    assert np.mean([len(one.target) for one in questions]) == pytest.approx(2.4, rel=0.02)
    assert make_questions(20, config_of(BIG)) == make_questions(20, config_of(BIG))


def test_operations_are_four_per_weight_and_token() -> None:
    """Two in the forward pass, and two for the gradient of the input, which the first layer does not need."""
    config = config_of(BIG)
    questions = make_questions(16, config)
    counted = count_operations(questions, config)
    linear = 32 * (4 * 2560**2 + 2 * 2560 * 10240)
    num_tokens = sum(one.num_tokens for one in sequences_of(questions, config, share=True))
    labels = sum(len(one.target) for one in questions)
    assert counted["shared"] == pytest.approx(4 * (num_tokens * linear + labels * 2560 * 50304), rel=0.04)
    assert counted["plain"] > 4.5 * counted["shared"]
    assert counted["unshared"] > 2 * counted["shared"]


@pytest.mark.slow
def test_benchmark_reports_rates_ratios_and_peaks(tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    arguments = ["benchmark", "--size", "tiny", "--questions", "8", "--turns", "1", "--plot", str(plot), "--json"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    rates = summary["questions_per_second"]
    assert summary["ratios"]["shared_vs_plain"] == rates["shared"] / rates["plain"]
    assert summary["ratios"]["shared_vs_unshared"] == rates["shared"] / rates["unshared"]
    assert set(summary["peak_memory_bytes"]) == {"plain", "unshared", "shared"}
    assert all(0 < share < 1 for share in summary["share_of_peak"].values())
    assert len(ElementTree.parse(plot).findall("{http://www.w3.org/2000/svg}rect")) == 3
