"""What the families with a transformer share: joint attention, and flow matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from expunge.base.errors import ExpungeError
from expunge.families import _text
from expunge.families._latent import LatentModel
from expunge.ops.attention import CrossAttention
from expunge.text import TextEntry


class FlowModel(LatentModel):
    """A transformer in which text and image attend to each other, trained by flow matching.

    Text is static in two places alone: the layer that embeds its tokens (`context_embedder`) and
    the layers that embed its pooled vector (`time_text_embed.text_embedder`). Behind them, every
    block mixes it with the image.

    At timestep t of 1000 latents are (1 − σ) x + σ ε with σ = t / 1000; the prediction is ε − x.
    """

    denoiser = "transformer"

    def log_snr(self) -> Tensor:
        # Timestep 0 has no noise at all, and an infinite log-SNR; it counts as a half.
        sigma = torch.arange(self._times + 1, dtype=torch.float64).clamp_min(0.5) / self._times
        # log((1 − σ)² / σ²), by log1p for σ near 0.
        return 2 * (torch.log1p(-sigma) - torch.log(sigma))

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        sigma = (t.double() / self._times).reshape(-1, 1, 1, 1).to(latents.device, latents.dtype)
        return (1 - sigma) * latents + sigma * noise

    def cross_attentions(self) -> tuple[CrossAttention, ...]:
        raise ExpungeError(
            f"{type(self).__name__} has no cross-attention:"
            f" {self.missing_capabilities['cross-attention']}"
        )

    def text_entries(self) -> tuple[TextEntry, ...]:
        return (TextEntry("transformer.context_embedder", "context"),)

    def pooled_entries(self) -> tuple[TextEntry, ...]:
        return (TextEntry("transformer.time_text_embed.text_embedder.linear_1", "pooled"),)

    @property
    def _times(self) -> int:
        return self.pipe.scheduler.config.num_train_timesteps

    def _time(self, t: Tensor | int, n: int) -> Tensor:
        """Return a timestep for each of n rows."""
        return torch.as_tensor(t, device=self.device).to(self.dtype).expand(n)


def t5(tokenizer: Any, encoder: Any, prompts: Sequence[str], length: int) -> tuple[_text.Tokens, Tensor]:
    """Encode prompts with T5: their tokens and states, (n, length, width), padding included.

    Args:
        tokenizer: T5's.
        encoder: T5's.
        prompts: distinct prompts.
        length: to which prompts are padded or cut.
    """
    tokens = _text.tokenize(tokenizer, prompts, length, starts=False)
    states = [encoder(ids.to(encoder.device))[0] for ids in tokens.ids.split(64)]
    return tokens, torch.cat(states)


def beside(first: Tensor, second: Tensor) -> Tensor:
    """Join two encoders' tokens one after the other, the narrower ones padded with zeros."""
    width = max(first.shape[-1], second.shape[-1])
    return torch.cat([pad(x, (0, width - x.shape[-1])) for x in (first, second)], 1)


def shift(config: Mapping[str, Any], tokens: int, most: float) -> float:
    """Compute how far a sampler's timesteps shift toward noise, linear in the image's tokens.

    Args:
        config: the scheduler's.
        tokens: how many the transformer makes of the image.
        most: the largest shift, where the configuration does not say it.
    """
    small, large = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", most)
    return low + (high - low) * (tokens - small) / (large - small)


def end(tokens: _text.Tokens) -> Tensor:
    """Find the end token of each prompt: (n,)."""
    return tokens.mask.sum(1) - 1
