"""Qwen-Image."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from expunge.families import _text
from expunge.families._flow import end, shift
from expunge.families._llm import LanguageModelText, filled
from expunge.families._lora import ALL, BaseModel, LoraNaming
from expunge.text import Text, TextEntry


class QwenImage(LanguageModelText):
    """A Qwen2.5-VL, and a transformer with joint attention.

    Tokens are the language model's last hidden states in a template of the family's own, without those
    of its instruction: at most 512 (`max_sequence_length` in `expunge.json`), the padding never read.
    The norm `txt_norm` comes first; `txt_in` is the one static entry.

    Guidance leads away from the empty prompt, and keeps the length that each token's prediction had for
    the prompt.
    """

    pipelines = ("QwenImagePipeline",)
    read_ahead = ("txt_norm",)
    # "v1" is what diffusers calls all that it does not know.
    single_files = ("v1",)
    single_file_key = "txt_norm.weight"
    most_tokens = 512
    missing_capabilities: ClassVar[Mapping[str, str]] = {
        "cross-attention": "text and image attend to each other, and so each depends on the other",
        "guidance in one batch": "its pipeline predicts with and without the prompt in two calls",
    }
    ldm_layers = ((r"(.+)", r"\1"),)
    lora_naming: ClassVar[LoraNaming] = LoraNaming(
        title="Qwen-Image",
        bases={
            "": BaseModel(
                "Qwen-Image",
                "qwen_image",
                "Qwen-Image",
                "https://github.com/QwenLM/Qwen-Image",
                1024,
            )
        },
        readers={
            "lora": {"diffusers": ALL, "comfyui": ALL},
            "kohya": {"diffusers": ALL, "comfyui": ALL},
        },
    )

    def __init__(self, pipe: Any, name: str = "", settings: Mapping[str, Any] | None = None) -> None:
        settings = {"guidance_scale": 4.0, "num_inference_steps": 50, **(settings or {})}
        super().__init__(pipe, name, settings)
        self.max_sequence_length: int = int(settings.get("max_sequence_length", 512))

    @cached_property
    def template(self) -> _text.Template:
        return _text.Template(*self.pipe.prompt_template_encode.split("{}"))

    @property
    def window(self) -> int:
        # The instruction's tokens do not count: they are cut off before the denoiser reads the rest.
        return super().window + self.pipe.prompt_template_encode_start_idx

    def text_entries(self) -> tuple[TextEntry, ...]:
        return (TextEntry("transformer.txt_in", "context"),)

    def _read(self, prompts: list[str]) -> Text:
        left_out, length = self.pipe.prompt_template_encode_start_idx, self.max_sequence_length
        tokens = _text.tokenize_in(
            self.pipe.tokenizer,
            prompts,
            self.template,
            length + left_out,
            padding="longest",
            side="right",
        )
        states = self._hidden(tokens, [-1])
        return Text(
            tuple(prompts),
            filled(self._ahead(states[:, left_out:]), length),
            filled(tokens.content_mask[:, left_out:], length).to(self.device),
            filled(tokens.ids[:, left_out:], length).to(self.device),
            eos_index=(end(tokens)[:, None] - left_out).clamp_min(0).to(self.device),
            attention_mask=filled(tokens.mask[:, left_out:].bool(), length).to(self.device),
        )

    def predict(self, latents: Tensor, t: Tensor | int, text: Text) -> Tensor:
        n, channels, height, width = latents.shape
        # Cut to the longest prompt, as in the pipeline: padding would cost attention and change nothing.
        longest = int(text.read.sum(1).max())
        mask = text.read[:, :longest]
        with self._past():
            output = self.network(
                hidden_states=self.pipe._pack_latents(latents, n, channels, height, width),
                timestep=self._time(t, n) / self._times,
                encoder_hidden_states=text.embeddings[:, :longest],
                # Without a mask, diffusers can take attention kernels that know none.
                encoder_hidden_states_mask=None if bool(mask.all()) else mask,
                img_shapes=[[(1, height // 2, width // 2)]] * n,
                return_dict=False,
            )[0]
        scale = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(output, height * scale, width * scale, scale)[:, :, 0]

    def _contrasted(self, empty: Tensor, prompt: Tensor, guidance: float) -> Tensor:
        found = super()._contrasted(empty, prompt, guidance)
        # A token is two by two pixels of every channel.
        was, became = (
            torch.nn.functional.avg_pool2d(x.square().sum(1, keepdim=True), 2) for x in (prompt, found)
        )
        ratio = (was / became).sqrt().repeat_interleave(2, 2).repeat_interleave(2, 3)
        return found * ratio

    def _set_timesteps(self, scheduler: Any, steps: int) -> None:
        _, height, width = self._latent_shape
        mu = shift(scheduler.config, height // 2 * (width // 2), 1.15)
        sigmas = np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(sigmas=sigmas, device=self.device, mu=mu)

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        side = self.sample_size or self.pipe.default_sample_size
        return self.network.config.in_channels // 4, side, side

    def _decoded(self, latents: Tensor) -> Tensor:
        # The autoencoder is Wan's for videos: an image is a clip of one frame.
        return super()._decoded(latents[:, :, None])[:, :, 0]

    def _coded(self, images: Tensor) -> Tensor:
        return super()._coded(images[:, :, None])[:, :, 0]

    def _scaled(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return (latents - mean) / deviation

    def _unscaled(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return latents * deviation + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and deviation of the autoencoder's latents, (1, channels, 1, 1)."""
        config = self.pipe.vae.config
        # A mean and deviation for each channel, in place of one scaling factor.
        mean, deviation = (
            torch.tensor(x).view(1, -1, 1, 1).to(like) for x in (config.latents_mean, config.latents_std)
        )
        return mean, deviation
