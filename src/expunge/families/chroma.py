"""Chroma: FLUX.1's layers with guidance, and without its pooled text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from expunge.families._flow import FlowModel, end, shift, t5
from expunge.families._flux_layers import FLUX_FUSED_LAYERS, FLUX_LAYERS
from expunge.families._lora import ALL, BaseModel, LoraNaming
from expunge.text import Text, TextEntry


class Chroma(FlowModel):
    """A T5, and a transformer with joint attention that knows time by a network of its own.

    Tokens are T5's 512, its padding masked in T5; the denoiser is told which tokens are the prompt's,
    its end, and the one behind. Pipelines add that mask to the scores of attention, where it weighs but
    does not hide: the padding is read, and so `Text` has no mask.

    Unconditional is the empty prompt.
    """

    pipelines = ("ChromaPipeline",)
    most_tokens = 512
    missing_capabilities: ClassVar[Mapping[str, str]] = {
        "cross-attention": "text and image attend to each other, and so each depends on the other",
        "guidance in one batch": "its pipeline predicts with and without the prompt in two calls",
    }
    single_files = ("chroma",)
    single_file_key = "distilled_guidance_layer.in_proj.bias"
    ldm_layers = FLUX_LAYERS  # its original code names layers alike
    ldm_fused_layers = FLUX_FUSED_LAYERS
    lora_naming: ClassVar[LoraNaming] = LoraNaming(
        title="Chroma",
        bases={
            "": BaseModel(
                "Chroma",
                "chroma",
                "chroma",
                "https://huggingface.co/lodestones/Chroma",
                1024,
            )
        },
        readers={
            "lora": {"diffusers": ALL, "comfyui": ALL},
            "kohya": {"diffusers": "none of the layers through which text enters", "comfyui": ALL},
        },
        words=(
            "distilled_guidance_layer",
            "in_proj",
        ),
    )

    def __init__(self, pipe: Any, name: str = "", settings: Mapping[str, Any] | None = None) -> None:
        settings = {"guidance_scale": 5.0, "num_inference_steps": 35, **(settings or {})}
        super().__init__(pipe, name, settings)
        self.max_sequence_length: int = int(settings.get("max_sequence_length", 512))

    @property
    def window(self) -> int:
        return self.max_sequence_length - 1  # less the end

    def pooled_entries(self) -> tuple[TextEntry, ...]:
        return ()

    def _read(self, prompts: list[str]) -> Text:
        tokens, states = t5(
            self.pipe.tokenizer, self.pipe.text_encoder, prompts, self.max_sequence_length, masked=True
        )
        return Text(
            tuple(prompts),
            states.to(self.device, self.dtype),
            tokens.content_mask.to(self.device),
            tokens.ids.to(self.device),
            eos_index=end(tokens)[:, None].to(self.device),
        )

    def predict(self, latents: Tensor, t: Tensor | int, text: Text) -> Tensor:
        n, channels, height, width = latents.shape
        if text.eos_index is None:
            raise TypeError("eos_index must be a tensor (n, 1), not None")
        place = torch.arange(text.embeddings.shape[1], device=self.device)
        # One token of padding stays unmasked, as it was in training.
        told = (place <= text.eos_index + 1).to(self.dtype)
        image = torch.ones(n, height // 2 * (width // 2), device=self.device, dtype=self.dtype)
        output = self.network(
            hidden_states=self.pipe._pack_latents(latents, n, channels, height, width),
            timestep=self._time(t, n) / self._times,
            encoder_hidden_states=text.embeddings,
            # Text has no place: all its tokens sit at the origin of the rotary embedding.
            txt_ids=torch.zeros(text.embeddings.shape[1], 3, device=self.device, dtype=self.dtype),
            img_ids=self.pipe._prepare_latent_image_ids(
                n, height // 2, width // 2, self.device, self.dtype
            ),
            attention_mask=torch.cat([told, image], 1),
            return_dict=False,
        )[0]
        scale = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(output, height * scale, width * scale, scale)

    def _set_timesteps(self, scheduler: Any, steps: int) -> None:
        _, height, width = self._latent_shape
        # The transformer makes one token of two by two latents.
        mu = shift(scheduler.config, height // 2 * (width // 2), 1.15)
        sigmas = np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(sigmas=sigmas, device=self.device, mu=mu)

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        size = self.sample_size or self.pipe.default_sample_size
        # The transformer takes four neighbours side by side: its channels are four times these.
        return self.network.config.in_channels // 4, size, size
