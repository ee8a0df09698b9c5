"""What the transformers with cross-attention share: keys and values that follow from the text alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from expunge.changes import check_in_use, iterate_layers
from expunge.families._latent import LatentModel
from expunge.ops.attention import CrossAttention
from expunge.text import Text, TextEntry


class CrossAttentionModel(LatentModel):
    """A transformer that text enters through the key and value projections of every cross-attention.

    They see the same token embeddings in every layer, image and step: what the layers of
    `read_ahead` have made of the text encoder's states.
    """

    denoiser = "transformer"
    _mask: Tensor | None = None

    def cross_attentions(self) -> tuple[CrossAttention, ...]:
        found = []
        for name, module in self._attentions():
            check_in_use(self.pipe, f"{self.denoiser}.{name}.to_k", hooked=True)
            # A norm behind a projection gives what is attended with.
            query, key = (
                module.get_submodule(norm) if getattr(module, norm, None) is not None else projection
                for norm, projection in (("norm_q", module.to_q), ("norm_k", module.to_k))
            )
            width = module.to_q.out_features // module.heads
            # Not `module.scale`: Wan's attention has none. All of them use PyTorch's 1/√width.
            found.append(CrossAttention(query, key, module.heads, width**-0.5, self._read_tokens))
        return tuple(found)

    def text_entries(self) -> tuple[TextEntry, ...]:
        found = []
        for name, _ in self._attentions():
            found.append(TextEntry(f"{self.denoiser}.{name}.to_k", "key"))
            found.append(TextEntry(f"{self.denoiser}.{name}.to_v", "value"))
        return tuple(found)

    def _attentions(self) -> Iterator[tuple[str, Any]]:
        """The cross-attentions of the denoiser, by name."""
        for name, module in iterate_layers(self.network):
            if name.endswith(".attn2"):
                yield name, module

    def _read_tokens(self) -> Tensor | None:
        """The tokens that the prediction under way reads, (n, tokens), bool; None for all."""
        return self._mask

    def _asked(self, text: Text, n: int) -> dict[str, Any]:
        """The text of a prediction for n rows, as the denoiser takes it; its mask is remembered."""
        # Attention maps are read by hooks, which see no argument of the denoiser: they ask for this.
        self._mask = text.attention_mask
        # In the weights' type, not bool: diffusers makes a bias, (1 − mask) · −10000, of it.
        mask = None if text.attention_mask is None else text.attention_mask.to(self.device, self.dtype)
        return {"encoder_hidden_states": text.embeddings, "encoder_attention_mask": mask}

    def _time(self, t: Tensor | int, n: int) -> Tensor:
        """A time for each of n rows."""
        return torch.as_tensor(t, device=self.device).expand(n)
