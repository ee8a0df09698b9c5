"""Stable Diffusion 1.x and 2.x, and models built like them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from expunge.families import _text
from expunge.families._unet import UNetModel
from expunge.text import Text


class StableDiffusion(UNetModel):
    """A CLIP text encoder, a U-Net with cross-attention, and a KL-VAE.

    Text enters through the key and value projections of every cross-attention (`attn2`), always as
    the same token embeddings: they do not depend on the layer, the image or the time.
    """

    pipelines = ("StableDiffusionPipeline",)
    single_files = ("v1", "v2")

    def _read(self, prompts: list[str]) -> Text:
        tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
        tokens = _text.tokenize(tokenizer, prompts, tokenizer.model_max_length)
        asks = getattr(encoder.config, "use_attention_mask", False)
        embeddings = []
        for ids, mask in zip(tokens.ids.split(64), tokens.mask.split(64), strict=True):
            mask = mask.to(encoder.device) if asks else None
            embeddings.append(encoder(ids.to(encoder.device), attention_mask=mask)[0])
        return Text(
            tuple(prompts),
            torch.cat(embeddings).to(self.device, self.dtype),
            tokens.content_mask.to(self.device),
            tokens.ids.to(self.device),
        )

    def predict(self, latents: Tensor, t: Tensor | int, text: Text) -> Tensor:
        return self.network(latents, t, encoder_hidden_states=text.embeddings, return_dict=False)[0]

    @classmethod
    def kohya(cls, layer: str, config: Mapping[str, Any]) -> str | None:
        # Its trainer takes SD 1 and 2 from diffusers, names and all.
        return "lora_unet_" + layer.replace(".", "_")
