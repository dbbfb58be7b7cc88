"""The trained half: frozen projection, 4-bit OPT, LoRA."""

import gc
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2PreTrainedModel,
    DynamicCache,
)
from transformers.modeling_outputs import CausalLMOutput

from pipeline.blip2.attention import TREE_ATTENTION, additive_masks
from pipeline.blip2.checkpoint import LANGUAGE_MODEL_PREFIXES
from pipeline.blip2.checkpoint_check import end_tokens, model_tensors
from pipeline.blip2.loading import load_half, require_finite
from pipeline.blip2.lora import compute_with_float_biases, require_all_saved, resolve_targets, targets_in_full_model
from pipeline.blip2.memory import give_back_memory, is_out_of_memory, keep_no_freed_memory
from pipeline.common.compat import cache_argument
from pipeline.common.errors import PipelineError
from pipeline.common.files import replacing_folder
from pipeline.common.library_errors import one_line

TREE_INPUTS = ("query_features", "input_ids", "text_lengths", "position_ids", "block_masks")
"""What describes token trees, by the names of `Blip2LanguageHalf.forward`."""


class Blip2LanguageHalf(Blip2PreTrainedModel):
    """`Blip2ForConditionalGeneration` without its encoder, under the same parameter names.

    A LoRA adapter trained on it therefore has the keys that PEFT expects on the full model.
    """

    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # the Trainer passes the number of labels of the whole optimizer step
    _keys_to_ignore_on_load_unexpected = (r"^vision_model\.", r"^qformer\.", r"^query_tokens$")

    def __init__(self, config: Blip2Config):
        super().__init__(config)
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, config.text_config.hidden_size)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config, attn_implementation=TREE_ATTENTION)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def forward(
        self,
        query_features: Tensor,
        input_ids: Tensor,
        text_lengths: list[int],
        position_ids: Tensor,
        block_masks: list[Tensor],
        label_indices: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutput:
        """The labels' weighted mean cross-entropy; logits are computed at these alone.

        The sequences are token trees, one behind the other and without padding, N nodes in all: of each the Q query
        tokens, then its text nodes. See `pipeline.blip2.prefix_tree`.

        Args:
            query_features: (trees, Q, D).
            input_ids: (text nodes,), tree by tree.
            text_lengths: text nodes of each tree.
            position_ids: (N,).
            block_masks: (S, S) bool, of one tree or some neighbours, whether node i sees node j; none sees beyond.
            label_indices: (L,), of all N, whose output is to be the label.
            labels: (L,) token ids.
            label_weights: (L,), of each in the sum.
            num_items_in_batch: what the sum is divided by; None is that of the weights.
        """
        logits = self.logits(query_features, input_ids, text_lengths, position_ids, block_masks, label_indices)
        loss = (functional.cross_entropy(logits, labels, reduction="none") * label_weights).sum()
        return CausalLMOutput(loss=loss / (label_weights.sum() if num_items_in_batch is None else num_items_in_batch))

    def logits(
        self,
        query_features: Tensor,
        input_ids: Tensor,
        text_lengths: list[int],
        position_ids: Tensor,
        block_masks: list[Tensor],
        label_indices: Tensor,
    ) -> Tensor:
        """(L, vocabulary) float32: what the model expects behind the nodes at `label_indices`, all as in `forward`."""
        hidden = self._read(query_features, input_ids, text_lengths, position_ids, block_masks)
        logits: Tensor = self.get_output_embeddings()(hidden[0, label_indices]).float()
        return logits

    @torch.no_grad()
    def generate(self, paths: Tensor, last_tokens: Tensor, num_beams: int = 1, **inputs: Any) -> "Generated":
        """What follows B prompts, the most probable by beam search, or greedily with one beam.

        All but a prompt's last token is read as token trees, so that what prompts have in common is read once; then
        each prompt goes its own way from the keys and values of the nodes on its path.

        Args:
            paths: (B, P) nodes, of all N, that a prompt's last token sees, in order; shorter ones begin with -1.
            last_tokens: (B,) the prompts' last tokens.
            inputs: those of `forward` that describe the trees, and settings of the library's `generate`.
        """
        trees = {name: inputs.pop(name) for name in TREE_INPUTS}
        ends, padding = end_tokens(self.config), self.config.text_config.pad_token_id
        padding = ends[0] if padding is None else padding
        cache = DynamicCache()
        self._read(**trees, cache=cache)
        for layer in cache.layers:
            layer.keys, layer.values = _along(paths, layer.keys), _along(paths, layer.values)
        cache.batch_repeat_interleave(num_beams)
        seen = functional.pad(paths >= 0, (0, 1), value=True)
        prompts = torch.where(seen, last_tokens[:, None], padding)
        found = self.language_model.generate(
            input_ids=prompts,  # of these the last alone is read: the others are in the cache
            attention_mask=seen.long(),
            eos_token_id=ends,
            pad_token_id=padding,
            do_sample=False,
            num_beams=num_beams,
            use_cache=True,  # a config that training has saved often says false
            return_dict_in_generate=True,
            output_scores=True,
            **{cache_argument(self.language_model): cache},
            **inputs,
        )
        tokens = found.sequences[:, prompts.shape[1] :]
        steps = self.language_model.compute_transition_scores(
            found.sequences, found.scores, found.get("beam_indices"), normalize_logits=num_beams == 1
        )
        ended = torch.isin(tokens, tokens.new_tensor(ends)).cumsum(1)
        ended = functional.pad(ended, (1, 0))[:, :-1]  # the end token itself counts
        return Generated(tokens, steps.masked_fill(ended > 0, 0.0).sum(1))

    def _read(
        self,
        query_features: Tensor,
        input_ids: Tensor,
        text_lengths: list[int],
        position_ids: Tensor,
        block_masks: list[Tensor],
        cache: DynamicCache | None = None,
    ) -> Tensor:
        """(1, N, H): the language model's last hidden states, behind the last norm."""
        embedded = self._embed_trees(query_features, input_ids, text_lengths)
        hidden: Tensor = self.language_model.base_model(
            inputs_embeds=embedded,
            attention_mask=block_masks[0].new_ones(1, 1, 1, 1),  # four-dimensional: the library leaves masks to us
            position_ids=position_ids[None],
            use_cache=cache is not None,
            block_biases=additive_masks(block_masks, embedded.dtype),
            **{cache_argument(self.language_model.base_model): cache},
        ).last_hidden_state
        return hidden

    def _embed_trees(self, query_features: Tensor, input_ids: Tensor, text_lengths: list[int]) -> Tensor:
        """(1, N, H): the projected query features of each tree, then the embeddings of its text nodes."""
        images = self.language_projection(query_features.to(self.language_projection.weight.dtype))
        texts = self.get_input_embeddings()(input_ids)
        pairs = zip(images.to(texts.dtype), torch.split(texts, text_lengths), strict=True)
        return torch.cat([piece for pair in pairs for piece in pair])[None]


class Generated(NamedTuple):
    """What was said to B prompts."""

    tokens: Tensor
    """(B, new tokens) ids; the end token and what fills shorter ones included."""
    log_probability: Tensor
    """(B,) of the tokens up to the end token."""


def _along(paths: Tensor, states: Tensor) -> Tensor:
    """(B, P), (1, heads, N, d) -> (B, heads, P, d): of each prompt the keys or values of the nodes on its path."""
    return states[0].transpose(0, 1)[paths.clamp(min=0)].transpose(1, 2)


def load_language_half(
    folder: Path,
    device: torch.device,
    compute_dtype: torch.dtype,
    bits: int | None = 4,
    quant_type: str = "nf4",
    double_quant: bool = True,
    dropout: float | None = None,
) -> Blip2LanguageHalf:
    """The language half of the checkpoint in `folder`, frozen; no tensor of the other half is read.

    With `bits=4` the linear layers of OPT's decoder are quantised by bitsandbytes, nothing else is;
    the rest is held in `compute_dtype`. `dropout` replaces the checkpoint's own.
    """
    config = Blip2Config.from_pretrained(folder)
    if dropout is not None:
        config.text_config.dropout = dropout
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=["language_projection", "lm_head"],
    )
    keep_no_freed_memory()
    model = load_half(
        Blip2LanguageHalf,
        folder,
        LANGUAGE_MODEL_PREFIXES,
        config=config,
        dtype=compute_dtype,
        device_map={"": device},
        quantization_config=quantization if bits else None,
    )
    require_finite(model, folder)
    if device.type == "cpu":
        _let_go_of_files(model)
    return model.eval().requires_grad_(False)


def _let_go_of_files(model: nn.Module) -> None:
    """Copies weights that lie in mapped files, so that the maps go.

    With what the allocator hoards, a process holds 10.6 GB after loading blip2-opt-2.7b in 4 bits, and 2.0 GB so.
    """
    for weight in model.parameters():
        if weight.is_floating_point():  # what is quantised was made in memory
            weight.data = weight.data.clone()
    gc.collect()
    give_back_memory()


def add_lora(
    model: Blip2LanguageHalf, r: int, alpha: float, dropout: float, target_modules: tuple[str, ...], bias: str
) -> PeftModel:
    """`model` with a fresh LoRA adapter; what is trained, biases included, is float32.

    Raises:
        ConfigError: a name in `target_modules` does not fit the model, or `bias` the installed PEFT.
    """
    targets = resolve_targets(model, target_modules)
    on_full_model = targets_in_full_model(model, targets, encoder_modules(model.config))
    dtype = model.dtype
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias=bias)
    adapted = get_peft_model(model, config)
    adapted.active_peft_config.target_modules = set(on_full_model)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()  # a gradient scaler takes no float16
    if bias != "none":
        require_all_saved(adapted)
    if dtype != torch.float32:
        compute_with_float_biases(adapted)
    keep_trainable(adapted)
    return adapted


def encoder_modules(config: Blip2Config) -> set[str]:
    """Names of the full model's modules that are not of the language half, and have weights."""
    tensors, _ = model_tensors(config)
    return {name.rpartition(".")[0] for name in tensors if not name.startswith(LANGUAGE_MODEL_PREFIXES)}


def keep_trainable(model: nn.Module) -> None:
    """Has answering leave the 4-bit weights as they are.

    On CPUs with bfloat16 instructions bitsandbytes repacks them, with rounded scales, when they first answer: for good,
    and into a form that does not train.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def copy_permissions(path: Path, folder: Path) -> None:
    """Gives the files in `folder` the permissions of one written the usual way: safetensors makes them its owner's."""
    for file in folder.iterdir():
        file.chmod(path.stat().st_mode)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter in PEFT's form, for the full model; `folder` appears, or is replaced, when it is whole.

    The same adapter gives the same bytes: PEFT would write the set of target modules in any order. Raises `WriteError`.
    """
    with replacing_folder(folder) as partial:
        model.save_pretrained(partial)
        path = partial / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["target_modules"] = sorted(config["target_modules"])
        config["auto_mapping"] = {
            "base_model_class": Blip2ForConditionalGeneration.__name__,
            "parent_library": Blip2ForConditionalGeneration.__module__,
        }
        path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        copy_permissions(path, partial)


def load_adapter(model: Blip2LanguageHalf, adapter: Path) -> PeftModel:
    """`model` with the adapter that `pipe train` wrote to `adapter`, for answering.

    Raises:
        PipelineError: it cannot be read, is of another model, lacks a tensor, or holds one that is not finite.
    """
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter)).eval()
        saved = load_file(adapter / SAFETENSORS_WEIGHTS_NAME)
        wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    except Exception as error:  # of a damaged file each release of the library raises something else
        if is_out_of_memory(error):
            raise
        raise PipelineError(
            f"{adapter}: not an adapter of this model ({one_line(error)}); train the run again"
        ) from None
    if lacking := sorted(wanted - saved.keys()):  # PEFT takes fresh ones in their place, and warns
        raise PipelineError(f"{adapter}: lacks {lacking[0]} ({len(lacking)} tensors in all); train the run again")
    for name, tensor in sorted(saved.items()):
        if not tensor.isfinite().all():
            raise PipelineError(f"{adapter}: {name} is not finite; train the run again")
    return adapted
