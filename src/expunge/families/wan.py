"""Wan 2.1, and 2.2's models of one transformer: a frame or a short clip."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.families import _text
from expunge.families._cross import CrossAttentionModel
from expunge.families._flow import end, t5
from expunge.families._lora import ALL, BaseModel, LoraNaming
from expunge.families._noise import Flow
from expunge.text import Text


class Wan(Flow, CrossAttentionModel):
    """A UMT5, and a transformer of videos with cross-attention, trained by flow matching.

    Tokens are UMT5's 512. The states of its padding are zeros, of which `text_embedder` makes the same
    vector everywhere; the denoiser has no mask and reads that, too. A norm stands behind the keys.

    An image is a video of one frame; `num_frames` in `expunge.json` draws a clip and shows its middle
    frame. Latents keep the frames among their channels: (n, channels · frames, height, width).

    Unconditional is the empty prompt.
    """

    missing_capabilities: ClassVar[Mapping[str, str]] = {
        "guidance in one batch": "its pipeline predicts with and without the prompt in two calls",
    }
    pipelines = ("WanPipeline",)
    read_ahead = ("condition_embedder.text_embedder",)
    single_files = ("wan-t2v-1.3B", "wan-t2v-14B")
    single_file_key = "head.modulation"
    most_tokens = 512
    ldm_layers = (
        (r"blocks\.(\d+)\.attn1\.to_q", r"blocks.\1.self_attn.q"),
        (r"blocks\.(\d+)\.attn1\.to_k", r"blocks.\1.self_attn.k"),
        (r"blocks\.(\d+)\.attn1\.to_v", r"blocks.\1.self_attn.v"),
        (r"blocks\.(\d+)\.attn2\.to_q", r"blocks.\1.cross_attn.q"),
        (r"blocks\.(\d+)\.attn2\.to_k", r"blocks.\1.cross_attn.k"),
        (r"blocks\.(\d+)\.attn2\.to_v", r"blocks.\1.cross_attn.v"),
        (r"blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.self_attn.o"),
        (r"blocks\.(\d+)\.attn2\.to_out\.0", r"blocks.\1.cross_attn.o"),
        (r"blocks\.(\d+)\.ffn\.net\.0\.proj", r"blocks.\1.ffn.0"),
        (r"blocks\.(\d+)\.ffn\.net\.2", r"blocks.\1.ffn.2"),
        (r"condition_embedder\.text_embedder\.linear_1", r"text_embedding.0"),
        (r"condition_embedder\.text_embedder\.linear_2", r"text_embedding.2"),
        (r"condition_embedder\.time_embedder\.linear_1", r"time_embedding.0"),
        (r"condition_embedder\.time_embedder\.linear_2", r"time_embedding.2"),
        (r"condition_embedder\.time_proj", r"time_projection.1"),
        (r"patch_embedding", r"patch_embedding"),
        (r"proj_out", r"head.head"),
    )
    lora_naming: ClassVar[LoraNaming] = LoraNaming(
        title="Wan",
        bases={
            "": BaseModel(
                "Wan",
                "wan2.1",
                "wan2.1",
                "https://github.com/Wan-Video/Wan2.1",
                1280,
            )
        },
        readers={"lora": {"diffusers": ALL}, "kohya": {"comfyui": ALL}},
        words=(
            "cross_attn",
            "text_embedding",
            "time_projection",
            "patch_embedding",
            "condition_embedder",
            "time_embedder",
            "time_proj",
        ),
    )

    def __init__(self, pipe: Any, name: str = "", settings: Mapping[str, Any] | None = None) -> None:
        settings = {"guidance_scale": 5.0, "num_inference_steps": 50, **(settings or {})}
        if pipe.components.get("transformer_2") is not None:
            raise ExpungeError(
                "this is a Wan 2.2 of two transformers, for early and late steps, each of which reads"
                " text in a way of its own: erase from a Wan of one transformer (2.1, or 2.2 TI2V)"
            )
        super().__init__(pipe, name, settings)
        self.max_sequence_length: int = int(settings.get("max_sequence_length", 512))
        self.num_frames: int = int(settings.get("num_frames", 1))

    @property
    def window(self) -> int:
        return self.max_sequence_length - 1  # less the end

    def count_tokens(self, prompt: str) -> int:
        return _text.count(self.pipe.tokenizer, self._cleaned(prompt))

    def _read(self, prompts: list[str]) -> Text:
        tokens, states = t5(
            self.pipe.tokenizer,
            self.pipe.text_encoder,
            [self._cleaned(prompt) for prompt in prompts],
            self.max_sequence_length,
            masked=True,
        )
        # The encoder's states of padding are not zero; the pipeline puts zeros in their place.
        states = torch.where(tokens.mask.bool()[..., None].to(states.device), states, 0)
        return Text(
            tuple(prompts),
            self._ahead(states),
            tokens.content_mask.to(self.device),
            tokens.ids.to(self.device),
            eos_index=end(tokens)[:, None].to(self.device),
        )

    def _cleaned(self, prompt: str) -> str:
        """A prompt as the pipeline reads it."""
        # The pipeline's own function, from its module: no class exports it.
        cleaned: str = sys.modules[type(self.pipe).__module__].prompt_clean(prompt)
        return cleaned

    def predict(self, latents: Tensor, t: Tensor | int, text: Text) -> Tensor:
        frames = self._latent_frames
        times = self._time(t, len(latents))
        if self.pipe.config.get("expand_timesteps"):  # a time for each token
            # Image-to-video gives its still frame's tokens time 0; from text alone all times are alike.
            _, high, wide = self.network.config.patch_size
            height, width = latents.shape[-2:]
            times = times[:, None].expand(-1, frames * (height // high) * (width // wide))
        with self._past():
            output = self.network(
                hidden_states=latents.unflatten(1, (-1, frames)),
                timestep=times,
                encoder_hidden_states=text.embeddings,
                return_dict=False,
            )[0]
        return output.flatten(1, 2)

    @property
    def _latent_frames(self) -> int:
        # The first frame stands alone; after it the autoencoder makes one of every four.
        return (self.num_frames - 1) // self.pipe.vae_scale_factor_temporal + 1

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        size: Any = self.sample_size or getattr(self.pipe, "default_sample_size", (60, 104))
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        return self.network.config.in_channels * self._latent_frames, height, width

    @property
    def _pixels(self) -> tuple[int, int]:
        _, height, width = self._latent_shape
        scale = self.pipe.vae_scale_factor_spatial
        return height * scale, width * scale

    def _decoded(self, latents: Tensor) -> Tensor:
        clip = super()._decoded(latents.unflatten(1, (-1, self._latent_frames)))
        return clip[:, :, clip.shape[2] // 2]

    def _coded(self, images: Tensor) -> Tensor:
        # A clip in which nothing moves: an image as the model knows it.
        still = images[:, :, None].repeat(1, 1, self.num_frames, 1, 1)
        return super()._coded(still).flatten(1, 2)

    def _scaled(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return (latents - mean) / deviation

    def _unscaled(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return latents * deviation + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and deviation of the autoencoder's latents, (1, channels · frames, 1, 1)."""
        config = self.pipe.vae.config
        mean, deviation = (
            # Frames vary fastest among the joined channels, as `flatten(1, 2)` leaves them.
            torch.tensor(x).repeat_interleave(self._latent_frames).view(1, -1, 1, 1).to(like)
            for x in (config.latents_mean, config.latents_std)
        )
        return mean, deviation
