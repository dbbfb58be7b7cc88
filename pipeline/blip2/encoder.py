"""Encoder half: ViT and Q-Former, `pixel_values` (B, 3, H, W) -> query features (B, Q, D)."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2PreTrainedModel, Blip2QFormerModel, Blip2VisionModel

from pipeline.blip2.checkpoint import ENCODER_PREFIXES
from pipeline.blip2.loading import load_half, require_finite
from pipeline.common.compat import keep_in_float32


@keep_in_float32("query_tokens", "qformer")  # as the full model does
class Blip2Encoder(Blip2PreTrainedModel):
    """`Blip2ForConditionalGeneration` without projection and language model, with the same parameter names."""

    main_input_name = "pixel_values"

    def __init__(self, config: Blip2Config):
        super().__init__(config)
        self.vision_model = Blip2VisionModel(config.vision_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size))
        self.qformer = Blip2QFormerModel(config.qformer_config)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images: (B, 3, H, W) -> (B, Q, D), in the dtype of the vision model."""
        image_embeds = self.vision_model(pixel_values).last_hidden_state
        query_output = self.qformer(
            query_embeds=self.query_tokens.expand(len(pixel_values), -1, -1),
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=torch.ones(image_embeds.shape[:2], dtype=torch.long, device=image_embeds.device),
        ).last_hidden_state
        return query_output.to(image_embeds.dtype)


def load_encoder(folder: Path, device: torch.device, dtype: torch.dtype) -> Blip2Encoder:
    """Load the encoder half of the checkpoint in `folder`, frozen. No tensor of the language half is read."""
    encoder = load_half(Blip2Encoder, folder, ENCODER_PREFIXES, dtype=dtype).to(device)
    require_finite(encoder, folder)
    return encoder.eval().requires_grad_(False)
