"""What the families with a transformer share: joint attention, and flow matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from expunge.base.errors import ExpungeError
from expunge.families import _text
from expunge.families._latent import LatentModel
from expunge.families._noise import Flow
from expunge.ops.attention import CrossAttention
from expunge.text import TextEntry


class FlowModel(Flow, LatentModel):
    """A transformer in which text and image attend to each other, trained by flow matching.

    Text is static in two places alone: the layer that embeds its tokens (`context_embedder`) and
    the layers that embed its pooled vector (`time_text_embed.text_embedder`). Behind them, every
    block mixes it with the image.

    At timestep t of 1000 latents are (1 − σ) x + σ ε with σ = t / 1000; the prediction is ε − x.
    """

    denoiser = "transformer"
    missing_capabilities: ClassVar[Mapping[str, str]] = {
        "cross-attention": "text and image attend to each other, and so each depends on the other"
    }

    def cross_attentions(self) -> tuple[CrossAttention, ...]:
        raise ExpungeError(
            f"{type(self).__name__} has no cross-attention:"
            f" {self.missing_capabilities['cross-attention']}"
        )

    def text_entries(self) -> tuple[TextEntry, ...]:
        return (TextEntry("transformer.context_embedder", "context"),)

    def pooled_entries(self) -> tuple[TextEntry, ...]:
        return (TextEntry("transformer.time_text_embed.text_embedder.linear_1", "pooled"),)

    def _time(self, t: Tensor | int, n: int) -> Tensor:
        """Return a timestep for each of n rows."""
        return torch.as_tensor(t, device=self.device).to(self.dtype).expand(n)


def t5(
    tokenizer: Any, encoder: Any, prompts: Sequence[str], length: int, *, masked: bool = False
) -> tuple[_text.Tokens, Tensor]:
    """The tokens of prompts and T5's states of them, (n, length, width), padding included.

    Args:
        tokenizer: T5's.
        encoder: T5's.
        prompts: the texts.
        length: how many tokens each has in the end.
        masked: whether the encoder is told where there is padding.
    """
    tokens = _text.tokenize(tokenizer, prompts, length, starts=False)
    states = []
    # In parts: 64 prompts of 512 tokens are half a GiB of T5-XXL's states, several in its layers.
    for ids, mask in zip(tokens.ids.split(64), tokens.mask.split(64), strict=True):
        told = {"attention_mask": mask.to(encoder.device)} if masked else {}
        states.append(encoder(ids.to(encoder.device), **told)[0])
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
    # Large images need more noise before they lose their layout, so their steps are put nearer to it.
    low, high = config.get("base_shift", 0.5), config.get("max_shift", most)
    # Not clamped: beyond the two lengths the pipelines follow the same line.
    return low + (high - low) * (tokens - small) / (large - small)


def end(tokens: _text.Tokens) -> Tensor:
    """Where the end token of each prompt stands: (n,)."""
    if tokens.end is None:
        raise TypeError("end must be a tensor (n,), not None")
    return tokens.end
