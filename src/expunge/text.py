"""Encoded prompts, and the layers through which they enter a denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Text:
    """Encoded prompts: n rows of `tokens` embeddings, as the denoiser sees them."""

    prompts: tuple[str, ...]
    """The prompts, one a row."""
    embeddings: Tensor
    """(n, tokens, width): the denoiser's `encoder_hidden_states`."""
    content_mask: Tensor
    """(n, tokens), bool: the prompt's own tokens, neither start, end nor padding."""
    ids: Tensor
    """(n, tokens), int64: the token ids."""
    pooled: Tensor | None = None
    """(n, pooled width), for families that read it."""
    eos_index: Tensor | None = None
    """(n, parts), int64: where each text encoder's end token stands; by default, one part whose start
    token and own tokens come before it."""
    segment_lengths: tuple[int, ...] = ()
    """How many of the tokens are each text encoder's, in order; by default, all are one's."""
    attention_mask: Tensor | None = None
    """(n, tokens), bool: the tokens that the denoiser reads; None is all of them. The embeddings of the
    others are zeros, so that they weigh nothing in a sum over tokens."""

    def __post_init__(self) -> None:
        if self.eos_index is None:
            # One start token, then the prompt's own: the end token stands right behind them.
            object.__setattr__(self, "eos_index", self.content_mask.sum(1, keepdim=True) + 1)
        if not self.segment_lengths:
            object.__setattr__(self, "segment_lengths", (self.content_mask.shape[1],))
        if self.attention_mask is not None:
            read = self.attention_mask[..., None]
            # Not multiplied by the mask: 0 · nan is nan.
            object.__setattr__(self, "embeddings", torch.where(read, self.embeddings, 0))

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def first_end(self) -> Tensor:
        """Where the first text encoder's end token stands in each row, (n, 1)."""
        if self.eos_index is None:
            raise TypeError("eos_index must be a tensor (n, parts), not None")
        return self.eos_index[:, :1]

    @property
    def read(self) -> Tensor:
        """The tokens that the denoiser reads, (n, tokens), bool."""
        return torch.ones_like(self.content_mask) if self.attention_mask is None else self.attention_mask

    def segments(self, row: int) -> list[tuple[slice, int]]:
        """Return, for each text encoder, the slice of its tokens in a row and the end token's index."""
        if self.eos_index is None:
            raise TypeError("eos_index must be a tensor (n, parts), not None")
        found, start = [], 0
        for length, end in zip(self.segment_lengths, self.eos_index[row].tolist(), strict=True):
            found.append((slice(start, start + length), end))
            start += length
        return found

    def from_last_token(self, row: int) -> list[slice]:
        """Find each encoder's last content token of a prompt, and all that follows it.

        A prompt without content, the empty one, begins with its start token there, or with its end token
        where the tokenizer has no start token (T5).

        Args:
            row: the prompt.

        Returns:
            For each text encoder the positions from that token on, the end and the padding included.
        """
        return [slice(max(own.start, end - 1), own.stop) for own, end in self.segments(row)]

    def __getitem__(self, rows: Sequence[int]) -> Text:
        """Return the text of some rows, in the order given."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.embeddings.device)
        return Text(
            tuple(self.prompts[i] for i in rows),
            self.embeddings[index],
            self.content_mask[index],
            self.ids[index],
            None if self.pooled is None else self.pooled[index],
            None if self.eos_index is None else self.eos_index[index],
            self.segment_lengths,
            None if self.attention_mask is None else self.attention_mask[index],
        )

    @classmethod
    def joined(cls, texts: Sequence[Text]) -> Text:
        """Concatenate the rows of several texts of one model."""
        pooled = [text.pooled for text in texts if text.pooled is not None]
        ends = [text.eos_index for text in texts if text.eos_index is not None]
        return cls(
            tuple(prompt for text in texts for prompt in text.prompts),
            torch.cat([text.embeddings for text in texts]),
            torch.cat([text.content_mask for text in texts]),
            torch.cat([text.ids for text in texts]),
            torch.cat(pooled) if pooled else None,
            torch.cat(ends),
            texts[0].segment_lengths,
            None
            if all(text.attention_mask is None for text in texts)
            else torch.cat([text.read for text in texts]),
        )


@dataclass(frozen=True)
class TextEntry:
    """A linear layer through which text enters the denoiser."""

    layer: str
    """The layer's name, as changes spell it: `unet.….attn2.to_k`."""
    role: Literal["key", "value", "context", "pooled"]
    """What its output is: keys or values of a cross-attention, the tokens that enter joint attention
    ("context"), or a vector of the whole prompt ("pooled")."""
