"""Stable Diffusion 1.x and 2.x, and models built like them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from expunge.errors import ExpungeError
from expunge.model import Model, Text, TextEntry, warn_cut
from expunge.ops.attention import CrossAttention


class StableDiffusion(Model):
    """A CLIP text encoder, a U-Net with cross-attention, and a KL-VAE.

    Text enters through the key and value projections of every cross-attention (`attn2`), always as
    the same token embeddings: they do not depend on the layer, the picture or the time.
    """

    pipelines = ("StableDiffusionPipeline",)

    @property
    def window(self) -> int:
        return self.pipe.tokenizer.model_max_length - 2  # less the start and the end

    def count_tokens(self, prompt: str) -> int:
        return len(self.pipe.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids)

    def knows(self, prompt: str) -> bool:
        tokenizer = self.pipe.tokenizer
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        return not set(ids) <= set(tokenizer.all_special_ids)  # the unknown token is one of them

    def vocabulary(self) -> tuple[str, ...]:
        tokens = sorted(self.pipe.tokenizer.get_vocab().items(), key=lambda item: item[1])
        words = (token.removesuffix("</w>") for token, _ in tokens if token.endswith("</w>"))
        return tuple(word for word in words if len(word) > 2 and word.isascii() and word.isalpha())

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Text:
        distinct = list(dict.fromkeys(prompts))
        tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
        for prompt in distinct:
            if len(prompt) > self.window and (n := self.count_tokens(prompt)) > self.window:
                warn_cut(prompt, n, self.window)
        tokens = tokenizer(
            distinct,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        asks = getattr(encoder.config, "use_attention_mask", False)
        embeddings = []
        for ids, mask in zip(tokens.input_ids.split(64), tokens.attention_mask.split(64), strict=True):
            mask = mask.to(encoder.device) if asks else None
            embeddings.append(encoder(ids.to(encoder.device), attention_mask=mask)[0])
        place = torch.arange(tokens.input_ids.shape[1])
        length = tokens.attention_mask.sum(1, keepdim=True)  # start, own tokens, end
        own = (place >= 1) & (place < length - 1)
        text = Text(
            tuple(distinct),
            torch.cat(embeddings).to(self.pipe.unet.device, self.pipe.unet.dtype),
            own.to(self.pipe.unet.device),
            tokens.input_ids.to(self.pipe.unet.device),
        )
        return text[[distinct.index(prompt) for prompt in prompts]]

    def predict(self, latents: Tensor, t: Tensor | int, text: Text) -> Tensor:
        return self.pipe.unet(latents, t, encoder_hidden_states=text.embeddings, return_dict=False)[0]

    def trajectory(
        self,
        text: Text,
        seeds: Sequence[int],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        unet, n = self.pipe.unet, len(seeds)
        guidance = self.guidance_scale if guidance_scale is None else guidance_scale
        guided = guidance > 1
        if guided:
            text = Text.joined([self.encode([""] * n), text])
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(num_inference_steps or self.num_inference_steps, device=unet.device)
        shape = (1, unet.config.in_channels, *self._latent_size)
        # One generator a picture, on the CPU: its noise depends on neither batch nor device.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = torch.cat([torch.randn(shape, generator=g) for g in generators])
        latents = noise.to(unet.device, unet.dtype) * scheduler.init_noise_sigma
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        extra: dict[str, Any] = {"generator": generators} if takes_generator else {}
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(latents, t)
            yield int(t), given
            output = self.predict(torch.cat([given] * 2) if guided else given, t, text)
            if guided:
                empty, prompt = output.chunk(2)
                output = empty + guidance * (prompt - empty)
            latents = scheduler.step(output, t, latents, **extra, return_dict=False)[0]
        yield 0, latents

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor
        pictures = vae.decode(latents, return_dict=False)[0]
        return (pictures / 2 + 0.5).clamp(0, 1).float().cpu()

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        vae, unet = self.pipe.vae, self.pipe.unet
        height, width = (side * self.pipe.vae_scale_factor for side in self._latent_size)
        if pictures.shape[-2:] != (height, width):
            found = " × ".join(map(str, pictures.shape[:-3:-1]))
            raise ExpungeError(f"a picture is {found} pixels; this model draws {width} × {height}")
        given = pictures.to(vae.device, vae.dtype) * 2 - 1
        latents = vae.encode(given, return_dict=False)[0].mode() * vae.config.scaling_factor
        return latents.to(unet.device, unet.dtype)

    def log_snr(self) -> Tensor:
        signal = self._signal()
        return torch.log(signal) - torch.log1p(-signal)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal = self._signal()[t.cpu()].reshape(-1, 1, 1, 1).to(latents.device)
        return signal.sqrt().to(latents.dtype) * latents + (1 - signal).sqrt().to(latents.dtype) * noise

    def cross_attentions(self) -> tuple[CrossAttention, ...]:
        return tuple(
            CrossAttention(module.to_q, module.to_k, module.heads, module.scale)
            for name, module in self.pipe.unet.named_modules()
            if name.endswith("attn2")
        )

    def text_entries(self) -> tuple[TextEntry, ...]:
        return tuple(
            TextEntry(f"unet.{name}", "key" if name.endswith("to_k") else "value")
            for name, _ in self.pipe.unet.named_modules()
            if name.endswith(("attn2.to_k", "attn2.to_v"))
        )

    def _signal(self) -> Tensor:
        """ᾱ, the variance of the signal at each time; (T,), float64."""
        return self.pipe.scheduler.alphas_cumprod.detach().cpu().double()

    @property
    def _latent_size(self) -> tuple[int, int]:
        size = self.pipe.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)
