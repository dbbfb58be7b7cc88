"""The cached, split pipeline computes the same as the plain end-to-end recipe.

The plain side uses transformers and PEFT alone: the full `Blip2ForConditionalGeneration`, its processor, and images.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import rounding
import torch
from data_set import write_config
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from plain_answers import assert_equal_but_for_ties, plain_answers
from plain_model import examples_of, load_full, load_processor, make_lora_nonzero, trainable
from rounding import relative_difference
from transformers import AutoProcessor, get_scheduler

import pipeline.commands.train
import pipeline.training.data
from cache.reader import FeatureReader
from pipeline.batches.sequences import pack
from pipeline.batches.split import load_tokenizer, open_split
from pipeline.blip2.base_model import load_base
from pipeline.blip2.language_model import add_lora
from pipeline.commands.evaluate import evaluate
from pipeline.commands.precompute import precompute
from pipeline.commands.train import train_run
from pipeline.common.compat import enable_activation_checkpointing
from pipeline.config import PRESETS, Config, load_config
from pipeline.data.examples import VQAExample
from pipeline.data.vqa import read_examples
from pipeline.runs.run import Run

IGNORED = -100  # label without loss in the plain recipe
CPU = torch.device("cpu")
BITS = pytest.mark.parametrize("bits", [None, 4], ids=["float32", "nf4"])


def plain_batch(processor: AutoProcessor, examples: list[VQAExample]) -> dict[str, torch.Tensor]:
    """Inputs of the recipe: images, prompt and answer as one text, labels on the answer and its end token only."""
    prompts = [f"Question: {example.question} Answer:" for example in examples]
    texts = [f"{prompt} {example.target}\n" for prompt, example in zip(prompts, examples, strict=True)]
    images = [Image.open(example.image) for example in examples]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        answer = processor.tokenizer(text.removeprefix(prompt), add_special_tokens=False)["input_ids"]
        end = int(inputs["attention_mask"][row].sum())
        labels[row, end - len(answer) : end] = torch.tensor(answer)
    return {**inputs, "labels": labels}


def test_cached_features_equal_the_full_models(cached: Config, checkpoint: Path) -> None:
    features = FeatureReader(cached.cache.dir)
    text = features.text("train")
    full, processor = load_full(checkpoint, bits=None), load_processor(checkpoint, "right")
    for number in range(0, len(text), 7):
        image = Image.open(text.record(number)["image"])
        pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            wanted = full.get_image_features(pixel_values, return_dict=True).qformer_outputs.last_hidden_state[0]
        cached_row = features.gather(text.image_row[[number]])[0]
        assert relative_difference(torch.from_numpy(cached_row), wanted) < rounding.FLOAT32
        assert np.abs(cached_row).max() > 0.1


@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared", "apart"])
@BITS
def test_loss_and_lora_gradients_equal_the_plain_recipes(
    cached: Config, checkpoint: Path, bits: int | None, share_prefix: bool
) -> None:
    config = cached.model_copy(update={"quantization": cached.quantization.model_copy(update={"bits": bits})})
    builder = open_split(config, "train")
    questions = [0, 1, 2, 10, 20, 30, 31]
    plain = get_peft_model(
        load_full(checkpoint, bits), LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    )
    ours = add_lora(load_base(config), 16, 32, 0.0, ("q_proj", "v_proj"), "none")
    make_lora_nonzero(plain)
    make_lora_nonzero(ours)

    picked = [examples_of(builder.text)[i] for i in questions]
    plain_loss = plain.train()(**plain_batch(load_processor(checkpoint, "right"), picked)).loss
    our_loss = ours.train()(**pack(builder.for_training(questions, share_prefix))).loss
    plain_loss.backward()
    our_loss.backward()

    assert our_loss.item() == pytest.approx(plain_loss.item(), rel=rounding.FLOAT32)
    gradients = {name: weight.grad for name, weight in trainable(plain).items()}
    assert set(gradients) == set(trainable(ours))
    assert len(gradients) == 2 * 2 * 4  # A and B of q_proj and v_proj in four layers
    for name, weight in trainable(ours).items():
        assert gradients[name].norm() > 0
        assert relative_difference(weight.grad, gradients[name]) < rounding.FLOAT32, name


@BITS
def test_lora_weights_after_20_steps_equal_the_plain_recipes(
    cached: Config, checkpoint: Path, bits: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Includes accumulation, gradient checkpointing, warm-up, cosine decay and clipping."""
    settings = {"max_steps": 20, "batch_size": 8, "micro_batch": 4, "gradient_checkpointing": True, "save_steps": 100}
    config = cached.model_copy(
        update={
            "quantization": cached.quantization.model_copy(update={"bits": bits}),
            "train": cached.train.model_copy(update={**settings, "warmup_steps": 5}),
        }
    )
    order, starting_weights = [], {}

    def remember_weights(*arguments: object, **named: object) -> PeftModel:
        model = add_lora(*arguments, **named)
        starting_weights.update({name: weight.detach().clone() for name, weight in trainable(model).items()})
        return model

    def remember_order(*arguments: object) -> object:
        builder = open_split(*arguments)
        build_sequences = builder.for_training
        builder.for_training = lambda questions, *how: order.append(list(questions)) or build_sequences(questions, *how)
        return builder

    monkeypatch.setattr(pipeline.commands.train, "add_lora", remember_weights)
    monkeypatch.setattr(pipeline.training.data, "open_split", remember_order)
    train_run(config, Run(tmp_path / "run"))
    trained = PeftModel.from_pretrained(load_full(checkpoint, bits), tmp_path / "run" / "adapter", is_trainable=True)

    plain = get_peft_model(
        load_full(checkpoint, bits), LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    )
    plain.load_state_dict(starting_weights, strict=False)
    _train_plainly(plain.train(), checkpoint, examples_of(open_split(config, "train").text), order, steps=20)

    for name, weight in trainable(plain).items():
        assert relative_difference(weight, starting_weights[name]) > 1e-3, f"{name} was not trained"
        assert relative_difference(trainable(trained)[name], weight) < 1e-4, name


def _train_plainly(
    model: PeftModel, checkpoint: Path, examples: list[VQAExample], order: list[list[int]], steps: int
) -> None:
    """The recipe as a torch loop: two micro-batches per step, the loss is the mean over the answer tokens of a step."""
    enable_activation_checkpointing(model)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=5, num_training_steps=steps)
    processor = load_processor(checkpoint, "right")
    for step in range(steps):
        batches = [plain_batch(processor, [examples[i] for i in half]) for half in np.array_split(order[step], 2)]
        counts = [int((batch["labels"] != IGNORED).sum()) for batch in batches]
        for batch, count in zip(batches, counts, strict=True):
            (model(**batch).loss * count / sum(counts)).backward()
        torch.nn.utils.clip_grad_norm_(trainable(model).values(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def easy_vqa_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A short training on images of easy-VQA, with 500 test questions."""
    folder = tmp_path_factory.mktemp("easy_vqa")
    for split, count in (("train", 800), ("test", 500)):
        rows = [example.to_record() for example in read_examples("easy_vqa", split).examples[:count]]
        root = Path(str(rows[0]["image"])).parent
        lines = [json.dumps({**row, "image": Path(str(row["image"])).name}) for row in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
        (folder / f"{split}-images").symlink_to(root)
    files = {s: {"annotations": f"{folder}/{s}.jsonl", "images": f"{folder}/{s}-images"} for s in ("train", "test")}
    config = load_config(
        write_config(
            folder,
            data={"val": None, **files},
            cache={"dtype": "float16"},
            train={"max_steps": 40, "batch_size": 32, "learning_rate": 3e-3, "save_steps": 100},
            evaluate={"split": "test"},
        )
    )
    precompute(config)
    run = Run(folder / "run")
    train_run(config, run)
    return run


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("greedy", {"max_new_tokens": 10}),
        ("official", {"num_beams": 5, "max_new_tokens": 10, "min_new_tokens": 1, "length_penalty": -1.0}),
    ],
)
def test_plain_transformers_and_peft_predict_the_same_on_500_test_questions(
    easy_vqa_run: Run, checkpoint: Path, preset: str, settings: dict[str, float]
) -> None:
    summary = evaluate(easy_vqa_run, tuple(f"evaluate.{key}={value}" for key, value in PRESETS[preset].items()))
    ours = [row["answer"] for row in json.loads(Path(summary.results).read_text())]

    model = PeftModel.from_pretrained(load_full(checkpoint, bits=4), easy_vqa_run.adapter).eval()
    config = load_config(easy_vqa_run.config)
    examples = examples_of(open_split(config, "test").text)
    plain = list(plain_answers(model, load_processor(checkpoint, "left"), examples, **settings))

    assert len(ours) == 500
    assert len(set(ours)) > 2
    assert_equal_but_for_ties(ours, plain, load_tokenizer(config), rounding.LOGITS[rounding.DTYPE_OF_4_BIT_ANSWERS])
