"""Stable Diffusion 1.x and 2.x, and models built like them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from expunge.families import _text
from expunge.families._lora import ALL, BaseModel, LoraNaming
from expunge.families._unet import UNetModel
from expunge.text import Text


class StableDiffusion(UNetModel):
    """A CLIP text encoder, a U-Net with cross-attention, and a KL-VAE.

    Text enters through the key and value projections of every cross-attention (`attn2`), always as
    the same token embeddings: they do not depend on the layer, the image or the time.
    """

    pipelines = ("StableDiffusionPipeline",)
    single_files = ("v1", "v2")
    lora_naming: ClassVar[LoraNaming] = LoraNaming(
        title="SD 1.x, 2.x",
        bases={
            "": BaseModel("Stable Diffusion 1.x", "sd_v1", "stable-diffusion-v1", resolution=512),
            "2": BaseModel("Stable Diffusion 2.x", "sd_v2", "stable-diffusion-v2-512", resolution=512),
            "2-v": BaseModel(
                "Stable Diffusion 2.x, predicting v",
                "sd_v2_v",
                "stable-diffusion-v2-768-v",
                resolution=768,
            ),
        },
        text_keys={"text_encoder": "lora_te_"},
        readers={
            "lora": {"diffusers": ALL, "comfyui": ALL, "forge": ALL},
            "kohya": dict.fromkeys(("diffusers", "comfyui", "a1111", "forge", "sd-scripts"), ALL),
        },
    )

    def _read(self, prompts: list[str]) -> Text:
        tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
        tokens = _text.tokenize(tokenizer, prompts, tokenizer.model_max_length)
        # Encoders that were trained with the padding masked say so; CLIP's own read it.
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
    def infer_variant(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Sequence[int]], prediction_type: str = ""
    ) -> str:
        """Tell apart versions 1 (""), 2 that predicts the noise ("2") and 2 that predicts v ("2-v").

        Args:
            config: the denoiser's configuration, or what `infer_config` makes of a single file.
            tensors: the names and shapes of a checkpoint's tensors.
            prediction_type: what the scheduler's configuration says.
        """
        keys = (shape for name, shape in tensors.items() if name.endswith("attn2.to_k.weight"))
        shape = next(keys, None)
        width = config.get("cross_attention_dim") if shape is None else shape[1]
        # Version 2 reads OpenCLIP's states, 1024 wide, and version 1 CLIP's, 768 wide.
        if width != 1024:
            return ""
        return "2-v" if prediction_type == "v_prediction" else "2"

    @classmethod
    def kohya_layer_name(cls, layer: str, config: Mapping[str, Any]) -> str | None:
        # Its trainer takes SD 1 and 2 from diffusers, names and all.
        return "lora_unet_" + layer.replace(".", "_")
