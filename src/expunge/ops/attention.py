"""Cross-attention maps, read while a denoiser runs, and how much of them falls where."""

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
    """One cross-attention: the layers that make its queries and keys, and how the two meet."""

    query: nn.Module
    """Gives (n, pixels, heads · width)."""
    key: nn.Module
    """Gives (n, tokens, heads · width)."""
    heads: int
    scale: float
    """What scores are multiplied by before the softmax."""


class _Enough(Exception):  # noqa: N818
    """Every attention has been read; what remains of the forward pass is not needed."""


class AttentionReader:
    """Listens to cross-attentions for the length of a `with` block, while a denoiser runs.

    The maps are computed beside the layers, from their queries and keys, so nothing that the
    denoiser computes changes. One map at a time is held, but for what gradients need. Checkpointed
    parts of a denoiser run a second time when gradients are asked for, and must then meet the same:
    ask for them inside the block.

    Args:
        attentions: the attentions to read.
        whole: let the denoiser run to its end, as checkpointing must; otherwise it is left once the
            last map has been read.
    """

    def __init__(self, attentions: Sequence[CrossAttention], *, whole: bool = False) -> None:
        self.attentions, self.whole = attentions, whole
        self._read: Callable[[Tensor, Tensor], Any] = lambda attention, _: attention
        self._found: dict[int, Any] | None = None
        self._waiting: dict[int, Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> AttentionReader:
        for i, attention in enumerate(self.attentions):
            for layer, is_query in ((attention.query, True), (attention.key, False)):
                hear = partial(self._hear, i, is_query)
                self._hooks.append(layer.register_forward_hook(hear))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._waiting = [], {}

    def read(self, read: Callable[[Tensor], T], forward: Callable[[], object]) -> list[T]:
        """What `read` makes of every attention's map while `forward` runs, in the order given.

        Args:
            read: gets a map (n, heads, pixels, tokens), whose rows over tokens sum to 1.
            forward: runs the denoiser.
        """
        return self.read_with_queries(lambda attention, _: read(attention), forward)

    def read_with_queries(
        self, read: Callable[[Tensor, Tensor], T], forward: Callable[[], object]
    ) -> list[T]:
        """As `read`, for what needs the queries Q beside the map.

        Args:
            read: gets a map (n, heads, pixels, tokens), and its queries (n, heads, pixels, width).
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
        other = self._waiting.pop(i)
        query, key = (output, other) if is_query else (other, output)
        attention = self.attentions[i]
        heard = self._read(attention_map(query, key, attention), by_head(query, attention.heads))
        if self._found is None:  # a second run, for gradients
            return
        self._found[i] = heard
        if len(self._found) == len(self.attentions) and not self.whole:
            raise _Enough


def read_attention(
    attentions: Sequence[CrossAttention], read: Callable[[Tensor], T], forward: Callable[[], object]
) -> list[T]:
    """What `read` makes of every attention's map while `forward` runs once: see `AttentionReader`."""
    with AttentionReader(attentions) as reader:
        return reader.read(read, forward)


def read_with_queries(
    attentions: Sequence[CrossAttention],
    read: Callable[[Tensor, Tensor], T],
    forward: Callable[[], object],
) -> list[T]:
    """As `read_attention`, for what needs the queries beside the map."""
    with AttentionReader(attentions) as reader:
        return reader.read_with_queries(read, forward)


def attention_map(query: Tensor, key: Tensor, attention: CrossAttention) -> Tensor:
    """A = softmax(scale · Q Kᵀ) for every head: (n, heads, pixels, tokens), float32 or finer."""
    scores = (by_head(query, attention.heads) * attention.scale) @ by_head(key, attention.heads).mT
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)


def by_head(projected: Tensor, heads: int) -> Tensor:
    """Queries or keys (n, rows, heads · width) as (n, heads, rows, width)."""
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


def energy(attention: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Σ_{i ∈ tokens} ‖Aⁱ ⊙ M‖² over heads and pixels, for each row: (n,).

    Args:
        attention: A, (n, heads, pixels, tokens).
        tokens: (n, tokens), 1 where a token counts and 0 elsewhere.
        mask: M, (n, pixels), 1 where a pixel counts and 0 elsewhere.
    """
    per_pixel = (attention.square() @ tokens.to(attention.dtype)[:, None, :, None]).squeeze(-1)
    return (per_pixel * mask.to(attention.dtype)[:, None]).sum((1, 2))


def infer_grid(pixels: int, height: int, width: int) -> tuple[int, int]:
    """The height and width of a layer with so many pixels, in a network that halves its latents.

    >>> infer_grid(16, 8, 8), infer_grid(12, 8, 5)
    ((4, 4), (4, 3))

    Raises:
        ExpungeError: no halving of (height, width) has so many.
    """
    h, w = height, width
    while h * w > pixels:
        h, w = (h + 1) // 2, (w + 1) // 2
    if h * w != pixels:
        raise ExpungeError(f"{pixels} pixels are no halving of latents of {height} × {width}")
    return h, w
