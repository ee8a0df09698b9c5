"""Read cross-attention maps while a denoiser runs, and measure how much attention falls where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from expunge.base.errors import ExpungeError

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class CrossAttention:
    """One cross-attention: the layers that make its queries and keys, and how scores are scaled."""

    query: nn.Module
    """Gives (n, pixels, heads · width)."""
    key: nn.Module
    """Gives (n, tokens, heads · width)."""
    heads: int
    scale: float
    """The factor of the scores before the softmax."""
    mask: Callable[[], Tensor | None] | None = None
    """Gives the tokens that are attended to at all, (n, tokens), bool, of the run that is read."""


class _Enough(Exception):  # noqa: N818
    """Raised when every attention has been read: the rest of the forward pass is not needed."""


class AttentionReader:
    """Read cross-attentions for the length of a `with` block, while a denoiser runs.

    The maps are computed beside the layers, from their queries and keys, so nothing that the
    denoiser computes changes. One map at a time is in memory, apart from what gradients need.
    Checkpointed parts of a denoiser run a second time during backpropagation and must find the same
    hooks: backpropagate inside the block.

    Args:
        attentions: the attentions to read.
        whole: let the denoiser run to its end, which checkpointing needs; otherwise stop it after the
            last map.
    """

    attentions: Sequence[CrossAttention]
    whole: bool

    def __init__(self, attentions: Sequence[CrossAttention], *, whole: bool = False) -> None:
        self.attentions, self.whole = attentions, whole
        self._read: Callable[[Tensor, Tensor], Any] = lambda attention, _: attention
        self._found: dict[int, Any] | None = None
        self._waiting: dict[int, Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> AttentionReader:
        for i, attention in enumerate(self.attentions):
            for layer, is_query in ((attention.query, True), (attention.key, False)):
                # Bound by `partial`: a closure would see the last i and is_query of the loop.
                hear = partial(self._hear, i, is_query)
                self._hooks.append(layer.register_forward_hook(hear))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._waiting = [], {}

    def read(self, read: Callable[[Tensor], T], forward: Callable[[], object]) -> list[T]:
        """Apply a function to every attention's map while the denoiser runs.

        Args:
            read: takes a map (n, heads, pixels, tokens), whose rows over tokens sum to 1.
            forward: runs the denoiser.

        Returns:
            The results, in the order of the attentions.
        """
        return self.read_with_queries(lambda attention, _: read(attention), forward)

    def read_with_queries(
        self, read: Callable[[Tensor, Tensor], T], forward: Callable[[], object]
    ) -> list[T]:
        """Apply a function to every attention's map and queries, as `read` does.

        Args:
            read: takes a map (n, heads, pixels, tokens), and its queries (n, heads, pixels, width).
            forward: runs the denoiser.
        """
        found: dict[int, T] = {}
        self._read, self._found, self._waiting = read, found, {}
        try:
            forward()
        except _Enough:
            pass
        finally:
            self._found = None
        return [found[i] for i in range(len(self.attentions))]

    def _hear(self, i: int, is_query: bool, _: nn.Module, given: object, output: Tensor) -> None:
        if i not in self._waiting:
            self._waiting[i] = output
            return
        # Implementations call queries and keys in either order; the second to come completes the
        # pair.
        other = self._waiting.pop(i)
        query, key = (output, other) if is_query else (other, output)
        attention = self.attentions[i]
        heard = self._read(attention_map(query, key, attention), by_head(query, attention.heads))
        if self._found is None:  # a checkpointed part runs a second time, for gradients
            return
        self._found[i] = heard
        if len(self._found) == len(self.attentions) and not self.whole:
            raise _Enough


def read_attention(
    attentions: Sequence[CrossAttention], read: Callable[[Tensor], T], forward: Callable[[], object]
) -> list[T]:
    """Apply a function to every attention's map while the denoiser runs once (`AttentionReader.read`).

    Args:
        attentions: the attentions to read.
        read: takes a map (n, heads, pixels, tokens).
        forward: runs the denoiser.
    """
    with AttentionReader(attentions) as reader:
        return reader.read(read, forward)


def read_with_queries(
    attentions: Sequence[CrossAttention],
    read: Callable[[Tensor, Tensor], T],
    forward: Callable[[], object],
) -> list[T]:
    """Apply a function to every attention's map and queries while the denoiser runs once.

    Args:
        attentions: the attentions to read.
        read: takes a map and its queries, (n, heads, pixels, width).
        forward: runs the denoiser.
    """
    with AttentionReader(attentions) as reader:
        return reader.read_with_queries(read, forward)


def attention_map(query: Tensor, key: Tensor, attention: CrossAttention) -> Tensor:
    """Compute A = softmax(scale · Q Kᵀ) of every head: (n, heads, pixels, tokens), float32 or finer.

    Args:
        query: (n, pixels, heads · width).
        key: (n, tokens, heads · width).
        attention: the number of heads, and the scale.
    """
    # Scaled before the product, as attention kernels do: half precision could overflow after it.
    scores = (by_head(query, attention.heads) * attention.scale) @ by_head(key, attention.heads).mT
    if attention.mask is not None and (mask := attention.mask()) is not None:
        scores = scores.masked_fill(~mask.to(scores.device)[:, None, None], -torch.inf)
    # Softmax in half precision loses the small weights that masks and losses are made of.
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)


def by_head(projected: Tensor, heads: int) -> Tensor:
    """Reshape queries or keys (n, rows, heads · width) to (n, heads, rows, width)."""
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


def energy(attention: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Sum ‖Aⁱ ⊙ M‖² over some tokens i, heads and pixels, for each row: (n,).

    Args:
        attention: A, (n, heads, pixels, tokens).
        tokens: (n, tokens), 1 where a token counts and 0 elsewhere.
        mask: M, (n, pixels), 1 where a pixel counts and 0 elsewhere.
    """
    # A product with the 0/1 vector of tokens: no copy of the map with the other tokens blanked.
    per_pixel = (attention.square() @ tokens.to(attention.dtype)[:, None, :, None]).squeeze(-1)
    return (per_pixel * mask.to(attention.dtype)[:, None]).sum((1, 2))


def infer_grid(pixels: int, height: int, width: int) -> tuple[int, int]:
    """Infer the height and width of a layer from its pixels, in a network that halves its latents.

    >>> infer_grid(16, 8, 8), infer_grid(12, 8, 5)
    ((4, 4), (4, 3))

    Args:
        pixels: of the layer.
        height: of the latents.
        width: of the latents.

    Raises:
        ExpungeError: no halving of (height, width) has so many.
    """
    h, w = height, width
    while h * w > pixels:
        # Odd sides round up, as a convolution of stride 2 with padding 1 does.
        h, w = (h + 1) // 2, (w + 1) // 2
    if h * w != pixels:
        raise ExpungeError(f"{pixels} pixels are no halving of latents of {height} × {width}")
    return h, w
