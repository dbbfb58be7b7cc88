"""Block-diagonal attention over concatenated sequences, registered with transformers as an attention implementation.

A block is one prefix tree or a few small ones, some hundred tokens. One matrix product per block, without padding, is
less work than one padded or masked product over all of them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TREE_ATTENTION = "prefix_tree"


def additive_masks(masks: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Convert (S, S) boolean masks to (S, S) of `dtype`: 0 where a token attends to another, else minus infinity."""
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
    """Attend within each block: (1, heads, N, d) each -> (1, N, heads, d).

    Without blocks it is transformers' `sdpa`: (B, heads, S, d) each -> (B, S, heads, d).

    On a CPU with gradients, explicit matrix products take half the time of torch's fused attention, which is tuned for
    longer sequences. Without gradients the fused one is faster.
    """
    if block_biases is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    eager = query.device.type == "cpu" and torch.is_grad_enabled()
    attend = _eager_attention if eager else functional.scaled_dot_product_attention
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
