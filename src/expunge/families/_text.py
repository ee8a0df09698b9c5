"""Tokenize prompts, with CLIP's tokenizers and T5's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tokens:
    """Distinct prompts, padded or cut to one length."""

    ids: Tensor
    """(n, tokens), int64"""
    mask: Tensor
    """(n, tokens), 1 where there is no padding"""
    content_mask: Tensor
    """(n, tokens), bool: the prompt's content tokens, neither start, end nor padding"""


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int, *, starts: bool = True) -> Tokens:
    """Tokenize prompts.

    Args:
        tokenizer: CLIP's, which begins with a start token, or T5's, which does not.
        prompts: the texts.
        length: to how many tokens each is padded or cut.
        starts: whether the tokenizer begins with a start token.
    """
    padded = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    place = torch.arange(length)
    end = padded.attention_mask.sum(1, keepdim=True) - 1  # the last token that is no padding
    own = (place >= int(starts)) & (place < end)
    return Tokens(padded.input_ids, padded.attention_mask, own)


def count(tokenizer: Any, prompt: str) -> int:
    """Count a prompt's content tokens, uncut."""
    return len(tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids)


def knows(tokenizer: Any, prompt: str) -> bool:
    """Tell whether a tokenizer knows any token of a prompt."""
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    return not set(ids) <= set(tokenizer.all_special_ids)  # the unknown token is one of them


def vocabulary(tokenizer: Any) -> tuple[str, ...]:
    """List the whole words that a CLIP tokenizer knows, in the order of their numbers."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    words = (token.removesuffix("</w>") for token, _ in tokens if token.endswith("</w>"))
    return tuple(word for word in words if len(word) > 2 and word.isascii() and word.isalpha())


def penultimate(encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Encode with CLIP: the last hidden states but one, (n, tokens, width), and the pooled output."""
    states, pooled = [], []
    for part in ids.split(64):
        output = encoder(part.to(encoder.device), output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled.append(output[0])
    return torch.cat(states), torch.cat(pooled)
