"""Stable Diffusion XL, and models built like it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from expunge.families import _text
from expunge.families._lora import ALL, STABILITY, BaseModel, LoraNaming
from expunge.families._unet import UNetModel
from expunge.text import Text, TextEntry


class SDXL(UNetModel):
    """Two CLIP text encoders, a U-Net with cross-attention, and a KL-VAE.

    Token embeddings are both encoders' last hidden states but one, side by side (768 + 1280 wide); they
    enter through the keys and values of every cross-attention. The second encoder's pooled output, a
    vector of the whole prompt, joins the time embedding through `add_embedding.linear_1`, beside
    the image's size.

    Unconditional is what the pipeline takes for no negative prompt: zeros, where its configuration says
    `force_zeros_for_empty_prompt`, else the empty prompt.
    """

    pipelines = ("StableDiffusionXLPipeline",)
    # "v1" is what diffusers calls all that it does not know, as it does a U-Net alone.
    single_files = ("xl_base", "playground-v2-5", "v1")
    single_file_key = "label_emb.0.0.weight"
    lora_naming: ClassVar[LoraNaming] = LoraNaming(
        title="SDXL",
        bases={"": BaseModel("SDXL", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", STABILITY)},
        text_keys={"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
        readers={
            "lora": {"diffusers": ALL, "comfyui": ALL, "forge": ALL},
            "kohya": {
                "diffusers": ALL,
                "comfyui": ALL,
                "a1111": ALL,
                "forge": ALL,
                "sd-scripts": "all but the pooled text's layer",
            },
        },
    )

    def _read(self, prompts: list[str]) -> Text:
        pipe, length = self.pipe, self.pipe.tokenizer.model_max_length
        tokens = _text.tokenize(pipe.tokenizer, prompts, length)
        second = _text.tokenize(pipe.tokenizer_2, prompts, length)
        # The first encoder's pooled output is left out: SDXL was trained on the second's alone.
        states, _ = _text.penultimate(pipe.text_encoder, tokens.ids)
        more, pooled = _text.penultimate(pipe.text_encoder_2, second.ids)
        return Text(
            tuple(prompts),
            torch.cat([states, more], -1).to(self.device, self.dtype),
            tokens.content_mask.to(self.device),
            tokens.ids.to(self.device),
            pooled.to(self.device, self.dtype),
        )

    def unconditional(self, n: int) -> Text:
        text = super().unconditional(n)
        if not self.pipe.config.force_zeros_for_empty_prompt:
            return text
        if text.pooled is None:
            raise TypeError("text must have a pooled vector, not None")
        # Mask and tokens stay those of the empty prompt: methods still ask where its end stands.
        zeros, pooled = torch.zeros_like(text.embeddings), torch.zeros_like(text.pooled)
        return Text(text.prompts, zeros, text.content_mask, text.ids, pooled)

    def predict(self, latents: Tensor, t: Tensor | int, text: Text) -> Tensor:
        size = [side * self.pipe.vae_scale_factor for side in self._latent_shape[1:]]
        # The size that the image had, where it was cut, and the size that it has.
        sizes = torch.tensor([[*size, 0, 0, *size]], dtype=self.dtype, device=self.device)
        added: dict[str, Any] = {"text_embeds": text.pooled, "time_ids": sizes.repeat(len(latents), 1)}
        return self.network(
            latents,
            t,
            encoder_hidden_states=text.embeddings,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def pooled_entries(self) -> tuple[TextEntry, ...]:
        return (TextEntry("unet.add_embedding.linear_1", "pooled"),)
