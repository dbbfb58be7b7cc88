"""Attention within blocks that lie one behind the other in one sequence, none of which sees another.

A block is a token tree or a few small ones, some hundred nodes: a matrix product a block, and no padding, is less work
than one padded or masked product for all. Registered with transformers as an attention implementation.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TREE_ATTENTION = "token_trees"


def additive_masks(masks: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """(S, S) bool each -> (S, S) of `dtype`: 0 where a node sees another, minus infinity where not."""
    return [torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf")) for mask in masks]


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    block_biases: list[Tensor] | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """(1, heads, N, d) each -> (1, N, heads, d); without blocks what `sdpa` does, with (B, heads, S, d).

    On a CPU the products are spelled out where gradients are wanted: forward and backward take half of the time of
    torch's fused attention, which is made for longer sequences. Forward alone, the fused one is faster.
    """
    if block_biases is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    spelled_out = query.device.type == "cpu" and torch.is_grad_enabled()
    attend = _eager_attention if spelled_out else functional.scaled_dot_product_attention
    by_block = (torch.split(tensor, [len(bias) for bias in block_biases], 2) for tensor in (query, key, value))
    outputs = [
        attend(q, k, v, bias, settings["dropout"], scale=settings["scaling"])
        for q, k, v, bias in zip(*by_block, block_biases, strict=True)
    ]
    return torch.cat(outputs, 2).transpose(1, 2), None


def _eager_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: float, scale: float) -> Tensor:
    weights = torch.matmul(query * scale, key.transpose(-1, -2)) + bias
    return torch.matmul(functional.dropout(weights.softmax(-1), dropout), value)


AttentionInterface.register(TREE_ATTENTION, tree_attention)
AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)
