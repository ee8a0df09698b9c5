"""FLUX.1: dev and schnell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from expunge.families import _text
from expunge.families._flow import FlowModel, end, shift, t5
from expunge.families._flux_layers import FLUX_FUSED_LAYERS, FLUX_LAYERS
from expunge.families._lora import ALL, BLACK_FOREST_LABS, BaseModel, LoraNaming
from expunge.text import Text


class Flux(FlowModel):
    """A CLIP and a T5, and a transformer with joint attention.

    Tokens are T5's alone, 512 of them (256 for schnell: `max_sequence_length` in `expunge.json`); the
    pooled vector is CLIP's.

    FLUX.1-dev is distilled from guided predictions: it takes a guidance scale and predicts for it
    in one pass. So nothing here ever contrasts two predictions. `draw` gives it `guidance_scale`;
    `predict` gives it 1, at which it predicts as its teacher did without guidance; *unconditional* is
    that prediction for the empty prompt. FLUX.1-schnell takes no guidance; its scale changes nothing.
    """

    pipelines = ("FluxPipeline",)
    most_tokens = 512
    missing_capabilities: ClassVar[Mapping[str, str]] = {
        "cross-attention": "text and image attend to each other, and so each depends on the other",
        "guidance in one batch": "guidance is distilled into it: no prediction without a prompt is made",
    }
    single_files = ("flux-dev", "flux-schnell")
    single_file_key = "double_blocks.0.img_attn.norm.key_norm.scale"
    ldm_layers = FLUX_LAYERS
    ldm_fused_layers = FLUX_FUSED_LAYERS
    lora_naming: ClassVar[LoraNaming] = LoraNaming(
        title="FLUX.1",
        bases={
            "": BaseModel("FLUX.1-dev", "flux1", "flux-1-dev", BLACK_FOREST_LABS),
            "dev": BaseModel("FLUX.1-dev", "flux1", "flux-1-dev", BLACK_FOREST_LABS),
            "schnell": BaseModel("FLUX.1-schnell", "flux1", "flux-1-schnell", BLACK_FOREST_LABS),
        },
        text_keys={"text_encoder": "lora_te1_"},
        readers={
            "lora": {"diffusers": ALL, "comfyui": ALL, "forge": ALL},
            "kohya": {
                "diffusers": "none of the layers through which text enters",
                "comfyui": ALL,
                "forge": ALL,
                "sd-scripts": ALL,
            },
        },
        unsupported={"a1111": "A1111 does not run FLUX.1 at all; Forge and ComfyUI do"},
        text_encoders={"text_encoder_3": "text_encoder_2"},  # trainers count T5 as the third everywhere
    )
    contrasts = False

    def __init__(self, pipe: Any, name: str = "", settings: Mapping[str, Any] | None = None) -> None:
        settings = {"guidance_scale": 3.5, "num_inference_steps": 28, **(settings or {})}
        super().__init__(pipe, name, settings)
        embeds_guidance = pipe.transformer.config.guidance_embeds
        self.max_sequence_length: int = int(
            settings.get("max_sequence_length", 512 if embeds_guidance else 256)
        )

    @property
    def window(self) -> int:
        return self.max_sequence_length - 1  # less the end

    def count_tokens(self, prompt: str) -> int:
        return _text.count(self.pipe.tokenizer_2, prompt)

    def _read(self, prompts: list[str]) -> Text:
        pipe = self.pipe
        clip = _text.tokenize(pipe.tokenizer, prompts, pipe.tokenizer.model_max_length)
        pooled = [pipe.text_encoder(ids.to(pipe.text_encoder.device)) for ids in clip.ids.split(64)]
        tokens, states = t5(pipe.tokenizer_2, pipe.text_encoder_2, prompts, self.max_sequence_length)
        return Text(
            tuple(prompts),
            states.to(self.device, self.dtype),
            tokens.content_mask.to(self.device),
            tokens.ids.to(self.device),
            torch.cat([output.pooler_output for output in pooled]).to(self.device, self.dtype),
            end(tokens)[:, None].to(self.device),
        )

    def predict(self, latents: Tensor, t: Tensor | int, text: Text) -> Tensor:
        # At a scale of 1 the distilled model predicts as its teacher did without guidance.
        return self._guided(latents, torch.as_tensor(t), text, 1.0)

    @classmethod
    def infer_variant(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Sequence[int]], prediction_type: str = ""
    ) -> str:
        """Tell apart "dev", which embeds the guidance scale, and "schnell", which does not.

        Args:
            config: the denoiser's configuration, or what `infer_config` makes of a single file.
            tensors: the names and shapes of a checkpoint's tensors.
            prediction_type: what the scheduler's configuration says.
        """
        guided = any(
            name.startswith(("guidance_in.", "time_text_embed.guidance")) or ".guidance_in." in name
            for name in tensors
        )
        return "dev" if guided or config.get("guidance_embeds") else "schnell"

    def _guided(self, latents: Tensor, t: Tensor, text: Text, guidance: float) -> Tensor:
        n, channels, height, width = latents.shape
        embeds_guidance = self.network.config.guidance_embeds
        output = self.network(
            hidden_states=self.pipe._pack_latents(latents, n, channels, height, width),
            # In [0, 1]: the transformer itself multiplies by 1000.
            timestep=self._time(t, n) / self._times,
            guidance=torch.full((n,), guidance, device=self.device) if embeds_guidance else None,
            pooled_projections=text.pooled,
            encoder_hidden_states=text.embeddings,
            # Text has no place: all its tokens sit at the origin of the rotary embedding.
            txt_ids=torch.zeros(text.embeddings.shape[1], 3, device=self.device, dtype=self.dtype),
            img_ids=self.pipe._prepare_latent_image_ids(
                n, height // 2, width // 2, self.device, self.dtype
            ),
            return_dict=False,
        )[0]
        scale = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(output, height * scale, width * scale, scale)

    def _set_timesteps(self, scheduler: Any, steps: int) -> None:
        _, height, width = self._latent_shape
        mu = shift(scheduler.config, height // 2 * (width // 2), 1.15)
        # Such a scheduler spaces its sigmas itself; the pipeline hands it none.
        if getattr(scheduler.config, "use_flow_sigmas", False):
            scheduler.set_timesteps(steps, device=self.device, mu=mu)
        else:
            sigmas = np.linspace(1.0, 1 / steps, steps)
            scheduler.set_timesteps(sigmas=sigmas, device=self.device, mu=mu)

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        size = self.sample_size or self.pipe.default_sample_size
        # The transformer takes four neighbours side by side: its channels are four times these.
        return self.network.config.in_channels // 4, size, size
