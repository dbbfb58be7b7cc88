"""The frozen half: ViT and Q-Former, `pixel_values` (B, 3, H, W) -> query features (B, Q, D)."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2PreTrainedModel, Blip2QFormerModel, Blip2VisionModel

from pipeline.blip2.checkpoint import ENCODER_PREFIXES
from pipeline.blip2.loading import load_half, require_finite


class Blip2Encoder(Blip2PreTrainedModel):
    """`Blip2ForConditionalGeneration` without projection and language model, under the same parameter names."""

    main_input_name = "pixel_values"
    _keep_in_fp32_modules = ("query_tokens", "qformer")  # as the full model
    _keys_to_ignore_on_load_unexpected = (r"^language_model\.", r"^language_projection\.")

    def __init__(self, config: Blip2Config):
        super().__init__(config)
        self.vision_model = Blip2VisionModel._from_config(config.vision_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size))
        self.qformer = Blip2QFormerModel._from_config(config.qformer_config)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, Q, D), in the vision model's dtype."""
        image_embeds = self.vision_model(pixel_values).last_hidden_state
        query_output = self.qformer(
            query_embeds=self.query_tokens.expand(len(pixel_values), -1, -1),
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=torch.ones(image_embeds.shape[:2], dtype=torch.long, device=image_embeds.device),
        ).last_hidden_state
        return query_output.to(image_embeds.dtype)


def load_encoder(folder: Path, device: torch.device, dtype: torch.dtype) -> Blip2Encoder:
    """The encoder half of the checkpoint in `folder`, frozen; no tensor of the other half is read."""
    encoder = load_half(Blip2Encoder, folder, ENCODER_PREFIXES, dtype=dtype).to(device)
    require_finite(encoder, folder)
    return encoder.eval().requires_grad_(False)
