"""The embedded checkpoint and the script that creates it."""

import random
from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner
from transformers import AutoProcessor, AutoTokenizer, Blip2ForConditionalGeneration

from pipeline.blip2.embedded.pretrain import main, make_tokenizer
from pipeline.blip2.embedded.scenes import COLOR_NAMES, SHAPES, draw_scene, sentence

SCENES = 300


def test_checkpoint_is_small_and_in_safetensors(checkpoint: Path) -> None:
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) <= 8_000_000
    assert {path.suffix for path in checkpoint.iterdir()} == {".json", ".safetensors", ".md"}


def test_tokenizer_is_that_of_the_script_with_special_tokens_of_opt(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    made = make_tokenizer(0)
    assert tokenizer.get_vocab() == made.get_vocab()
    rng = random.Random("tokenizer")
    texts = ["".join(sentence(draw_scene(rng), rng)) for _ in range(100)]
    assert tokenizer(texts)["input_ids"] == made(texts)["input_ids"]
    ids = tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<image>"])
    assert ids == [0, 1, 2, len(tokenizer) - 1]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "</s>", "<pad>")
    text = "Is naïve 東京 there?\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_plain_transformers_describes_a_scene(checkpoint: Path) -> None:
    """The task of the pretraining, on held-out scenes."""
    model = Blip2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    rng = random.Random("unseen")
    scenes = [scene for scene in (draw_scene(rng) for _ in range(60)) if len(scene.things) == 1][:30]
    inputs = processor(
        images=[scene.pixels for scene in scenes], text=["A picture of"] * len(scenes), return_tensors="pt"
    )
    tokens = model.generate(**inputs, max_new_tokens=10, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    captions = [text.split() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    named = [words[-2:] == scene.things[0].name.split() for words, scene in zip(captions, scenes, strict=True)]
    assert sum(named) >= 0.8 * len(scenes)


def test_scenes_are_seeded_and_sentences_are_true() -> None:
    for seed in range(SCENES):
        scene, again = draw_scene(random.Random(seed)), draw_scene(random.Random(seed))
        assert np.array_equal(scene.pixels, again.pixels)
        assert scene.things == again.things
        shapes, colors = scene.patch_labels()
        assert set(shapes[shapes > 0]) <= {1 + SHAPES.index(thing.shape) for thing in scene.things}
        assert set(colors[colors > 0]) <= {1 + COLOR_NAMES.index(thing.color) for thing in scene.things}
        prompt, continuation = sentence(scene, random.Random(seed))
        assert continuation.startswith(" ")
        if prompt.startswith("True or false: there is "):
            noun = prompt.removeprefix("True or false: there is ").removesuffix(". Answer:")
            words = set(noun.split()) - {"a", "an", "no", "shape", "thing"}
            holds = any(words <= {thing.shape, thing.color} for thing in scene.things)
            assert continuation == (" true" if holds != noun.startswith("no ") else " false")


def test_script_writes_a_loadable_checkpoint(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [str(tmp_path / "made"), "--vision-steps=2", "--language-steps=2"])
    assert done.exit_code == 0, done.output
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "made")
    assert model.language_projection.weight.dtype == torch.float16
    assert AutoProcessor.from_pretrained(tmp_path / "made").num_query_tokens == 16
