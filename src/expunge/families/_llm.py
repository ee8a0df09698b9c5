"""What the families share that read prompts with a language model, in a chat template."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.families import _text
from expunge.families._flow import FlowModel
from expunge.text import TextEntry


class LanguageModelText(FlowModel):
    """A transformer with joint attention whose text encoder is a language model.

    The encoder is causal: words behind a concept carry it, words before it never. What the template puts
    behind the prompt carries the whole prompt, as the end token does in CLIP: it begins at
    `Text.eos_index`.
    """

    max_sequence_length: int
    """How many tokens the denoiser may read, the template's among them."""

    @cached_property
    def template(self) -> _text.Template:
        """What the family puts around a prompt."""
        raise NotImplementedError

    @property
    def window(self) -> int:
        return self.max_sequence_length - self._surroundings

    @cached_property
    def _surroundings(self) -> int:
        return _text.surroundings(self.pipe.tokenizer, self.template)

    def count_tokens(self, prompt: str) -> int:
        return _text.own_tokens(self.pipe.tokenizer, prompt, self.template)

    def pooled_entries(self) -> tuple[TextEntry, ...]:
        return ()

    def _hidden(self, tokens: _text.Tokens, layers: Sequence[int]) -> Tensor:
        """Some of the language model's hidden states side by side, (n, tokens, layers · width)."""
        encoder = self.pipe.text_encoder
        told: dict[str, Any] = {"output_hidden_states": True}
        takes = inspect.signature(encoder.forward).parameters
        # The scores of every word of the vocabulary are not wanted, and would take the most memory.
        told |= {k: v for k, v in {"use_cache": False, "logits_to_keep": 1}.items() if k in takes}
        found = []
        # Every layer's hidden states are returned at once: 16 prompts are a few GiB in the largest.
        for ids, mask in zip(tokens.ids.split(16), tokens.mask.split(16), strict=True):
            device = encoder.device
            states = encoder(input_ids=ids.to(device), attention_mask=mask.to(device), **told)
            if max(layers) >= (n := len(states.hidden_states)):
                raise ExpungeError(
                    f"this model reads the hidden states {', '.join(map(str, layers))} of its text"
                    f" encoder, which has {n}: give the text encoder that the model was made with"
                )
            found.append(torch.cat([states.hidden_states[layer] for layer in layers], -1))
        return torch.cat(found)


def filled(x: Tensor, length: int) -> Tensor:
    """Rows of tokens (n, tokens, …), filled up with zeros, or cut, to so many tokens."""
    if x.shape[1] >= length:
        return x[:, :length]
    return torch.cat([x, x.new_zeros(len(x), length - x.shape[1], *x.shape[2:])], 1)
