"""A ComfyUI MODEL and CLIP, asked what a closed-form method asks of a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.families import _text
from expunge.families.stable_diffusion import StableDiffusion
from expunge.text import Text, TextEntry

KEYS, VALUES = ".attn2.to_k.weight", ".attn2.to_v.weight"


class ComfyStableDiffusion(StableDiffusion):
    """Stable Diffusion 1.x and 2.x as ComfyUI holds it. It encodes and has weights; it does not draw.

    Layers have ComfyUI's own names, so that what a method returns is applied as it is.
    """

    def __init__(self, model: Any, clip: Any) -> None:
        tokenizer = find_tokenizer(clip)
        super().__init__(SimpleNamespace(tokenizer=tokenizer, config={}), "ComfyUI")
        self.clip = clip
        self.weights: dict[str, Tensor] = model.model_state_dict()
        if not any(name.endswith(KEYS) for name in self.weights):
            raise ExpungeError(
                "this MODEL has no cross-attentions with text; Erase concepts knows Stable Diffusion 1"
                " and 2; for others, export an edit: expunge export EDIT --to comfyui"
            )

    @property
    def device(self) -> torch.device:
        """Return the CPU: the closed forms are solved there."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Return float32."""
        return torch.float32

    def text_entries(self) -> tuple[TextEntry, ...]:
        """Return the keys and values of every cross-attention, by ComfyUI's names."""
        return tuple(
            TextEntry(name.removesuffix(".weight"), "key" if name.endswith(KEYS) else "value")
            for name in self.weights
            if name.endswith((KEYS, VALUES))
        )

    def weight(self, layer: str) -> Tensor:
        """Return a layer's weight, (out, in), float32 on the CPU."""
        return self.weights[f"{layer}.weight"].detach().float().cpu()

    def _read(self, prompts: list[str]) -> Text:
        length = self.pipe.tokenizer.model_max_length
        tokens = _text.tokenize(self.pipe.tokenizer, prompts, length)
        rows = []
        for prompt in prompts:
            # Parentheses are weights to ComfyUI's tokenizer; a name is meant as it stands.
            shielded = prompt.replace("(", "\\(").replace(")", "\\)")
            encoded = self.clip.encode_from_tokens(self.clip.tokenize(shielded), return_pooled=True)
            rows.append(encoded[0].float().cpu())
        return Text(tuple(prompts), torch.cat(rows), tokens.content_mask, tokens.ids)


def find_tokenizer(clip: Any) -> Any:
    """Return the Hugging Face tokenizer inside a ComfyUI CLIP.

    Raises:
        ExpungeError: there are several text encoders, or none that is CLIP.
    """
    held = clip.tokenizer
    inner = [getattr(held, name) for name in ("clip_l", "clip_h") if hasattr(held, name)]
    others = [name for name in ("clip_g", "t5xxl", "gemma", "qwen") if hasattr(held, name)]
    if len(inner) != 1 or others:
        raise ExpungeError(
            "Erase concepts reads models with one CLIP text encoder (Stable Diffusion 1 and 2); for"
            " others, export an edit: expunge export EDIT --to comfyui"
        )
    return inner[0].tokenizer
