"""Choice of the training targets."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import rounding
from data_set import write_config

from pipeline.batches.sequences import SequenceBuilder, pack
from pipeline.batches.split import load_tokenizer, open_split
from pipeline.batches.training import training_batches
from pipeline.commands.precompute import precompute
from pipeline.commands.train import train_run
from pipeline.common.errors import PipelineError
from pipeline.config import Config, load_config
from pipeline.data.targets import Targets
from pipeline.runs.run import Run

ANSWERS = [["red"] * 6 + ["blue"] * 3 + ["a big circle"], ["circle"] * 10, ["left", "right"] * 5]


@pytest.fixture(scope="module")
def ten_answers(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Write three questions on each of four images, with ten answers each."""
    from conftest import write_data_set

    folder = tmp_path_factory.mktemp("ten")
    write_data_set(folder, num_images=4)
    rows = [
        {"image": f"{image}.png", "question": f"question {number}?", "answers": answers}
        for image in range(4)
        for number, answers in enumerate(ANSWERS)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = load_config(write_config(folder, data={"val": None}))
    precompute(config)
    return config


def with_answers(config: Config, answers: str) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"answers": answers})})


def targets_of(config: Config, choice: str, seed: int = 0) -> tuple[Targets, SequenceBuilder]:
    builder = open_split(config, "train")
    return Targets(builder.text, load_tokenizer(config), choice, seed), builder


def spelled(config: Config, tokens: np.ndarray) -> str:
    return load_tokenizer(config).decode([tokens.tolist()])[0]


def test_all_weights_each_distinct_answer(ten_answers: Config) -> None:
    targets, _ = targets_of(ten_answers, "all")
    found = {spelled(ten_answers, tokens): weight for tokens, weight in targets(0, epoch=0)}
    assert found == pytest.approx({"red": 0.6, "blue": 0.3, "a big circle": 0.1})
    assert [weight for _, weight in targets(1, epoch=0)] == [1.0]


def test_sampled_varies_by_epoch_and_seed_in_proportion(ten_answers: Config) -> None:
    targets, _ = targets_of(ten_answers, "sampled")
    drawn = [spelled(ten_answers, targets(0, epoch)[0][0]) for epoch in range(400)]
    counts = Counter(drawn)
    assert counts["red"] == pytest.approx(240, abs=40)
    assert counts["blue"] == pytest.approx(120, abs=40)
    assert counts["a big circle"] == pytest.approx(40, abs=25)
    again, other = targets_of(ten_answers, "sampled")[0], targets_of(ten_answers, "sampled", seed=1)[0]
    assert [spelled(ten_answers, again(0, epoch)[0][0]) for epoch in range(50)] == drawn[:50]
    assert [spelled(ten_answers, other(0, epoch)[0][0]) for epoch in range(50)] != drawn[:50]


def test_loss_of_all_is_the_weighted_mean(ten_answers: Config) -> None:
    from pipeline.blip2.base_model import load_base

    targets, builder = targets_of(ten_answers, "all")
    model = load_base(ten_answers, dropout=0.0).train()
    question = 0
    together = model(**pack(builder.for_training([question], targets=lambda number: targets(number, 0)))).loss
    summed, weights = 0.0, 0.0
    for tokens, share in targets(question, 0):
        alone = pack(builder.for_training([question], targets=lambda _, tokens=tokens: [(tokens, 1.0)]))
        summed += share * model(**alone, num_items_in_batch=1).loss.item()
        weights += share * len(tokens)
    assert together.item() == pytest.approx(summed / weights, rel=rounding.FLOAT32)


@pytest.mark.parametrize("answers", ["sampled", "all"])
def test_training_on_several_answers_is_deterministic(ten_answers: Config, tmp_path: Path, answers: str) -> None:
    adapters = []
    for name, choice in (("first", answers), ("again", answers), ("common", "most_common")):
        run = Run(tmp_path / name)
        train_run(with_answers(ten_answers, choice), run)
        adapters.append((run.adapter / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
    assert adapters[0] != adapters[2]


def test_training_batches_depend_on_the_epoch(ten_answers: Config) -> None:
    config = with_answers(ten_answers, "sampled")
    builder = open_split(config, "train")
    batches = training_batches(config, builder, np.arange(12))
    labels = []
    for epoch in range(6):
        batches.set_epoch(epoch)
        labels.append(np.concatenate([one.tree.labels for one in batches.build(list(range(12)))]).tolist())
    assert len({tuple(one) for one in labels}) > 1


def test_auto_is_the_most_common_answer(ten_answers: Config) -> None:
    assert ten_answers.training_answers == "most_common"


def test_answer_longer_than_the_model_is_reported(ten_answers: Config, tmp_path: Path) -> None:
    folder = tmp_path / "long"
    from conftest import write_data_set

    write_data_set(folder, num_images=4)
    row = {"image": "0.png", "question": "what?", "answers": ["red", "red", "very " * 3000]}
    (folder / "train.jsonl").write_text(json.dumps(row))
    config = load_config(write_config(folder, data={"val": None}))
    precompute(config)
    with pytest.raises(PipelineError, match="tokens long with its image and answer"):
        train_run(with_answers(config, "all"), Run(folder / "run"))
