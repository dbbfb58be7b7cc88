"""Language half: frozen projection, 4-bit OPT and the LoRA adapter that is trained."""

import gc
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
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
from pipeline.common.compat import cache_argument, keep_weights_trainable
from pipeline.common.errors import PipelineError
from pipeline.common.files import replacing_folder
from pipeline.common.library_errors import one_line

TREE_INPUTS = ("query_features", "input_ids", "text_lengths", "position_ids", "block_masks")
"""Arguments of `Blip2LanguageHalf.forward` that describe the prefix trees."""


class Blip2LanguageHalf(Blip2PreTrainedModel):
    """`Blip2ForConditionalGeneration` without its encoder, with the same parameter names.

    A LoRA adapter trained on it therefore has the keys that PEFT expects on the full model.
    """

    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # the Trainer then passes num_items_in_batch

    def __init__(self, config: Blip2Config):
        super().__init__(config)
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, config.text_config.hidden_size)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config, attn_implementation=TREE_ATTENTION)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Return the output layer."""
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
        """Compute the weighted mean cross-entropy of the labels. Logits are computed only where labels are.

        The input is a concatenation of prefix trees without padding, N tokens in total: for each tree its Q query
        tokens, then its text tokens. See `pipeline.blip2.prefix_tree`.

        Args:
            query_features: (trees, Q, D).
            input_ids: text tokens of all trees, concatenated.
            text_lengths: number of text tokens of each tree.
            position_ids: (N,).
            block_masks: (S, S) bool each: whether token i of a block attends to token j. A block is one tree or
                several consecutive ones; no token attends to another block.
            label_indices: (L,) index, among all N tokens, of the token whose output predicts the label.
            labels: (L,) token ids.
            label_weights: (L,) weight of each label in the sum.
            num_items_in_batch: divisor of the sum; by default the sum of the weights.
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
        """Return the float32 logits (L, vocabulary) at `label_indices`. The arguments are those of `forward`."""
        hidden = self._hidden_states(query_features, input_ids, text_lengths, position_ids, block_masks)
        logits: Tensor = self.get_output_embeddings()(hidden[0, label_indices]).float()
        return logits

    @torch.no_grad()
    def generate(self, paths: Tensor, last_tokens: Tensor, num_beams: int = 1, **inputs: Any) -> "Generated":
        """Generate continuations of B prompts by beam search, or greedily with one beam.

        All but the last token of each prompt is prefilled as prefix trees, so that shared prefixes are computed once.
        Each prompt then continues from the keys and values of the tokens on its path.

        Args:
            paths: (B, P) indices, among all N tokens, of the tokens that the last token of a prompt attends to, in
                order; left-padded with -1.
            last_tokens: (B,) last token of each prompt.
            num_beams: number of beams.
            inputs: the arguments of `forward` in `TREE_INPUTS`, and settings of transformers' `generate`.
        """
        trees = {name: inputs.pop(name) for name in TREE_INPUTS}
        ends, padding = end_tokens(self.config), self.config.text_config.pad_token_id
        padding = ends[0] if padding is None else padding
        cache = DynamicCache()
        self._hidden_states(**trees, cache=cache)
        for layer in cache.layers:
            layer.keys, layer.values = _select_paths(paths, layer.keys), _select_paths(paths, layer.values)
        cache.batch_repeat_interleave(num_beams)
        attended = functional.pad(paths >= 0, (0, 1), value=True)
        prompts = torch.where(attended, last_tokens[:, None], padding)
        output = self.language_model.generate(
            input_ids=prompts,  # only the last token is computed: the others are in the cache
            attention_mask=attended.long(),
            eos_token_id=ends,
            pad_token_id=padding,
            do_sample=False,
            num_beams=num_beams,
            use_cache=True,  # configs saved in training often disable it
            return_dict_in_generate=True,
            output_scores=True,
            **{cache_argument(self.language_model): cache},
            **inputs,
        )
        tokens = output.sequences[:, prompts.shape[1] :]
        log_probabilities = self.language_model.compute_transition_scores(
            output.sequences, output.scores, output.get("beam_indices"), normalize_logits=num_beams == 1
        )
        ended = torch.isin(tokens, tokens.new_tensor(ends)).cumsum(1)
        ended = functional.pad(ended, (1, 0))[:, :-1]  # the end token itself is included
        return Generated(tokens, log_probabilities.masked_fill(ended > 0, 0.0).sum(1))

    def _hidden_states(
        self,
        query_features: Tensor,
        input_ids: Tensor,
        text_lengths: list[int],
        position_ids: Tensor,
        block_masks: list[Tensor],
        cache: DynamicCache | None = None,
    ) -> Tensor:
        """Return the last hidden states of the language model, (1, N, H), after the final norm."""
        embedded = self._embed_trees(query_features, input_ids, text_lengths)
        hidden: Tensor = self.language_model.base_model(
            inputs_embeds=embedded,
            attention_mask=block_masks[0].new_ones(1, 1, 1, 1),  # transformers passes a 4-D mask on unchanged
            position_ids=position_ids[None],
            use_cache=cache is not None,
            block_biases=additive_masks(block_masks, embedded.dtype),
            **{cache_argument(self.language_model.base_model): cache},
        ).last_hidden_state
        return hidden

    def _embed_trees(self, query_features: Tensor, input_ids: Tensor, text_lengths: list[int]) -> Tensor:
        """Embed each tree as its projected query features followed by its text tokens: (1, N, H)."""
        images = self.language_projection(query_features.to(self.language_projection.weight.dtype))
        texts = self.get_input_embeddings()(input_ids)
        pairs = zip(images.to(texts.dtype), torch.split(texts, text_lengths), strict=True)
        return torch.cat([piece for pair in pairs for piece in pair])[None]


class Generated(NamedTuple):
    """Generated continuations of B prompts."""

    tokens: Tensor
    """(B, new tokens) token ids, with the end token and padding."""
    log_probability: Tensor
    """(B,) sum of the log probabilities of the tokens up to the end token."""


def _select_paths(paths: Tensor, states: Tensor) -> Tensor:
    """Select the keys or values on the path of each prompt: (B, P), (1, heads, N, d) -> (B, heads, P, d)."""
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
    """Load the language half of the checkpoint in `folder`, frozen. No tensor of the encoder half is read.

    Args:
        folder: the checkpoint.
        device: device of the model.
        compute_dtype: dtype of the computation and of all weights that are not quantized.
        bits: 4 quantizes the linear layers of OPT's decoder with bitsandbytes; None quantizes nothing.
        quant_type: 4-bit format, `nf4` or `fp4`.
        double_quant: quantize the scales too.
        dropout: replaces the dropout of the checkpoint.
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
        _copy_out_of_mapped_files(model)
    return model.eval().requires_grad_(False)


def _copy_out_of_mapped_files(model: nn.Module) -> None:
    """Copy the weights that are views of memory-mapped files, and release the maps.

    After loading blip2-opt-2.7b in 4 bits, a process holds 10.6 GB without this and 2.0 GB with it.
    """
    for weight in model.parameters():
        if weight.is_floating_point():  # quantized weights are in memory already
            weight.data = weight.data.clone()
    gc.collect()
    give_back_memory()


def add_lora(
    model: Blip2LanguageHalf, r: int, alpha: float, dropout: float, target_modules: tuple[str, ...], bias: str
) -> PeftModel:
    """Add a new LoRA adapter to `model`. Trained weights, biases included, are float32.

    Args:
        model: the language half.
        r: rank.
        alpha: scale, of which PEFT applies alpha / r.
        dropout: dropout of the adapter's inputs.
        target_modules: names of the adapted modules, or `all-linear`.
        bias: trained biases: `none`, `all` or `lora_only`.

    Raises:
        ConfigError: a name in `target_modules` matches no linear layer, or the installed PEFT does not support `bias`.
    """
    targets = resolve_targets(model, target_modules)
    on_full_model = targets_in_full_model(model, targets, encoder_modules(model.config))
    dtype = model.dtype
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias=bias)
    adapted = get_peft_model(model, config)
    adapted.active_peft_config.target_modules = set(on_full_model)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()  # gradient scaling does not support float16 weights
    if bias != "none":
        require_all_saved(adapted)
    if dtype != torch.float32:
        compute_with_float_biases(adapted)
    keep_weights_trainable(adapted)
    return adapted


def encoder_modules(config: Blip2Config) -> set[str]:
    """Return the names of the modules of the encoder half that have weights."""
    tensors, _ = model_tensors(config)
    return {name.rpartition(".")[0] for name in tensors if not name.startswith(LANGUAGE_MODEL_PREFIXES)}


def copy_permissions(path: Path, folder: Path) -> None:
    """Give all files in `folder` the permissions of `path`: safetensors makes its files readable by the owner only."""
    for file in folder.iterdir():
        file.chmod(path.stat().st_mode)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter in PEFT's format for the full model, replacing `folder` atomically.

    The same adapter gives the same bytes: target modules are sorted, which PEFT writes in the order of a set.

    Raises:
        WriteError: a file cannot be written.
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
    """Add the adapter that `pipe train` wrote to `adapter`, for inference.

    Raises:
        PipelineError: the adapter cannot be read, belongs to another model, or has a missing or non-finite tensor.
    """
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter)).eval()
        saved = load_file(adapter / SAFETENSORS_WEIGHTS_NAME)
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    except Exception as error:  # the exception for a damaged file depends on the release of PEFT
        if is_out_of_memory(error):
            raise
        raise PipelineError(
            f"{adapter}: not an adapter of this model ({one_line(error)}); train the run again"
        ) from None
    if missing := sorted(expected - saved.keys()):  # PEFT initializes these and warns
        raise PipelineError(f"{adapter}: missing {missing[0]} ({len(missing)} tensors in total); train the run again")
    for name, tensor in sorted(saved.items()):
        if not tensor.isfinite().all():
            raise PipelineError(f"{adapter}: {name} is not finite; train the run again")
    return adapted
