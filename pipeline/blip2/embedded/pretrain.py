"""Pretrains the embedded checkpoint: `python -m pipeline.blip2.embedded.pretrain DEST`.

Training has two stages, as BLIP-2's own. First the vision model learns to classify the shape and the color of each
patch, with two linear heads that are discarded. Then it is frozen, and Q-Former, projection and OPT are trained
together to continue sentences about the scene. Everything is seeded, and a killed run resumes from its last state file.
"""

import random
from collections.abc import Callable
from pathlib import Path

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    GPT2Tokenizer,
)

from pipeline.blip2.embedded.scenes import COLOR_NAMES, IMAGE_SIZE, PATCH_SIZE, SHAPES, Scene, draw_scene, sentence

QUERY_TOKENS = 16
WIDTH = 128  # hidden size of the vision model, the Q-Former and the language model
VOCABULARY = 640
IMAGES_PER_STEP = 64
SENTENCES_PER_IMAGE = 3
STEPS_PER_STATE = 250
# Common words of questions, so that the tokenizer does not split them into letters.
QUESTION_WORDS = (
    "what which who whose where when why how many much is are was were does do did has have can could will would "
    "should the a an this that these those there here in on at of to from with without under over behind near "
    "and or not no yes image picture photo shape color colour thing object kind type name number side contain "
    "contains show shows present absent visible seen see any some all both only one two three four five"
)
IGNORED = -100

SentenceBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
StepLoss = Callable[[list[Scene], random.Random], tuple[torch.Tensor, torch.Tensor]]


def make_tokenizer(seed: int) -> GPT2Tokenizer:
    """Train a byte-level BPE tokenizer with OPT's special tokens at OPT's ids and `<image>` as the last token."""
    rng = random.Random(f"{seed} tokenizer")
    lines = ["".join(sentence(draw_scene(rng), rng)) + "\n" for _ in range(5000)]
    lines += [f" {word}" for word in QUESTION_WORDS.split()] * 50
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A $B", special_tokens=[("</s>", 2)]
    )
    return GPT2Tokenizer(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        model_max_length=256,
    )


def make_config(tokenizer: GPT2Tokenizer) -> Blip2Config:
    """Return a small config with the same classes and options as `Salesforce/blip2-opt-2.7b`."""
    return Blip2Config(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "initializer_range": 0.02,
        },
        qformer_config={
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 1,
            "max_position_embeddings": 1,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config={
            "model_type": "opt",
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "word_embed_proj_dim": WIDTH,
            "ffn_dim": 4 * WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "dropout": 0.0,
            "bos_token_id": 2,
            "pad_token_id": 1,
            "eos_token_id": tokenizer.convert_tokens_to_ids("Ċ"),
        },
        num_query_tokens=QUERY_TOKENS,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )


def image_processor() -> BlipImageProcessorPil:
    """Return the image processor of the checkpoint."""
    return BlipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def pixel_values(scenes: list[Scene]) -> torch.Tensor:
    """Preprocess scenes with the image processor of the checkpoint: (B, 3, 64, 64) float32."""
    pixels = image_processor()([scene.pixels for scene in scenes], return_tensors="pt")
    return pixels["pixel_values"]


class PatchHeads(nn.Module):
    """Linear classifiers of the shape and the color of each patch; not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.shape = nn.Linear(WIDTH, 1 + len(SHAPES))
        self.color = nn.Linear(WIDTH, 1 + len(COLOR_NAMES))

    def forward(self, patches: torch.Tensor, scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss, and the shape accuracy on object patches. `patches` is (B, 64, WIDTH)."""
        labels = [scene.patch_labels() for scene in scenes]
        shape = torch.stack([torch.from_numpy(label[0]) for label in labels]).flatten()
        color = torch.stack([torch.from_numpy(label[1]) for label in labels]).flatten()
        shape_logits = self.shape(patches).flatten(0, 1)
        loss = functional.cross_entropy(shape_logits, shape)
        loss = loss + functional.cross_entropy(self.color(patches).flatten(0, 1), color)
        things = shape > 0
        return loss, (shape_logits.argmax(-1) == shape)[things].float().mean()


def sentence_batch(scenes: list[Scene], rng: random.Random, tokenizer: GPT2Tokenizer, newline: int) -> SentenceBatch:
    """Return `input_ids`, `attention_mask` and `labels`, each (B, T), of sentences about scenes, right-padded."""
    rows = []
    for scene in scenes:
        for _ in range(SENTENCES_PER_IMAGE):
            prompt, continuation = sentence(scene, rng)
            prompt_ids = tokenizer(prompt)["input_ids"]
            answer_ids = tokenizer(continuation, add_special_tokens=False)["input_ids"] + [newline]
            rows.append((prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids))
    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.tensor([ids + [1] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor([row + [IGNORED] * (longest - len(row)) for _, row in rows])
    attention_mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows])
    return input_ids, attention_mask, labels


def language_loss(
    model: Blip2ForConditionalGeneration, scenes: list[Scene], batch: SentenceBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss on the continuations, and the fraction of them predicted exactly."""
    input_ids, attention_mask, labels = batch
    with torch.no_grad():
        image_embeds = model.vision_model(pixel_values(scenes)).last_hidden_state
    queries = model.qformer(
        query_embeds=model.query_tokens.expand(len(scenes), -1, -1), encoder_hidden_states=image_embeds
    ).last_hidden_state
    prefix = model.language_projection(queries).repeat_interleave(SENTENCES_PER_IMAGE, dim=0)
    text = model.language_model.get_input_embeddings()(input_ids)
    logits = model.language_model(
        inputs_embeds=torch.cat([prefix, text], dim=1),
        attention_mask=functional.pad(attention_mask, (QUERY_TOKENS, 0), value=1),
    ).logits[:, QUERY_TOKENS - 1 : -1]
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    correct = (logits.argmax(-1) == labels) | (labels == IGNORED)
    return loss, correct.all(-1).float().mean()


class Stage:
    """A resumable sequence of optimizer steps."""

    def __init__(self, name: str, modules: nn.Module, steps: int, learning_rate: float, state_file: Path):
        self.name, self.modules, self.steps, self.state_file = name, modules, steps, state_file
        trained = [p for p in modules.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=learning_rate, total_steps=steps, pct_start=0.08, cycle_momentum=False
        )

    def run(self, seed: int, step_loss: StepLoss) -> None:
        """Call `step_loss(scenes, rng) -> (loss, accuracy)` for each step, whose index seeds its scenes."""
        first = self._resume()
        for step in (bar := tqdm(range(first, self.steps), desc=self.name, initial=first, total=self.steps)):
            rng = random.Random(f"{seed} {self.name} {step}")
            loss, accuracy = step_loss([draw_scene(rng) for _ in range(IMAGES_PER_STEP)], rng)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy.item():.3f}", refresh=False)
            if (step + 1) % STEPS_PER_STATE == 0 or step + 1 == self.steps:
                self._save(step + 1)

    def _save(self, step: int) -> None:
        state = {
            "step": step,
            "modules": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        partial = self.state_file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.state_file)

    def _resume(self) -> int:
        if not self.state_file.exists():
            return 0
        state = torch.load(self.state_file, weights_only=True)
        self.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        return state["step"]


@click.command(context_settings={"show_default": True})
@click.argument("dest", type=click.Path(path_type=Path, file_okay=False))
@click.option("--vision-steps", default=2500, help="Optimizer steps of the vision model.")
@click.option("--language-steps", default=2500, help="Optimizer steps of Q-Former, projection and OPT.")
@click.option("--seed", default=0, help="Seed of the weights, the scenes and the sentences.")
def main(dest: Path, vision_steps: int, language_steps: int, seed: int) -> None:
    """Pretrain the embedded checkpoint and write it to DEST in Hugging Face format (float16 safetensors)."""
    state = dest.with_name(dest.name + ".state")
    state.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)  # weight decay produces denormals, which are ten times slower on a CPU
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(seed)
    config = make_config(tokenizer)
    model = Blip2ForConditionalGeneration(config).train()
    nn.init.trunc_normal_(model.query_tokens, std=0.02)

    heads = PatchHeads()
    vision = nn.ModuleList([model.vision_model, heads])
    Stage("vision", vision, vision_steps, 1e-3, state / "vision.pt").run(
        seed,
        lambda scenes, rng: heads(model.vision_model(pixel_values(scenes)).last_hidden_state[:, 1:], scenes),
    )
    model.vision_model.requires_grad_(False)
    newline = config.text_config.eos_token_id
    Stage("language", model, language_steps, 1e-3, state / "language.pt").run(
        seed,
        lambda scenes, rng: language_loss(model, scenes, sentence_batch(scenes, rng, tokenizer, newline)),
    )

    model.half().save_pretrained(dest)
    Blip2Processor(image_processor(), tokenizer, num_query_tokens=QUERY_TOKENS).save_pretrained(dest)


if __name__ == "__main__":
    main()
