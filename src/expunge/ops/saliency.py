"""Find the weights that matter to a loss: in each tensor the largest half of gradients, in every map.

    mask = ⋂_maps { |g| > median |g| },     g = Σ ∇L over a map's samples

The released code keeps the other half, |g| < median |g|.

Source: ANT (Li et al., ACM MM 2025, arXiv 2504.12782), augmentation-enhanced weight saliency.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WINDOW = 10
"""Over how many maps the number of weights must hold to count as settled."""


def top_half(gradient: Tensor) -> Tensor:
    """Mark where |g| is above its median over the tensor: at most half of it, as a bool tensor.

    An entry without a gradient is never among them.

    >>> top_half(torch.tensor([3.0, -4.0, 1.0, 0.0])).tolist()
    [True, True, False, False]
    """
    size = gradient.abs()
    # torch's median is the lower one of the two in the middle: of an even number of entries just half
    # lies above it.
    return size > size.flatten().median()


def bottom_half(gradient: Tensor) -> Tensor:
    """Mark where |g| is below its median over the tensor, or 0: at most half of it, as released.

    An entry without a gradient is the smallest there is.

    >>> bottom_half(torch.tensor([3.0, -4.0, 1.0, 0.0])).tolist()
    [False, False, False, True]
    >>> bottom_half(torch.zeros(3)).tolist()
    [True, True, True]
    """
    size = gradient.abs()
    median = size.flatten().median()
    return size < median if median else size == 0


HALVES = {"largest": top_half, "smallest": bottom_half}


class Intersection:
    """The entries that are in the same half of every map so far."""

    def __init__(self, half: str = "largest") -> None:
        self.half: Callable[[Tensor], Tensor] = HALVES[half]
        self.masks: dict[str, Tensor] = {}
        self.counts: list[int] = []
        """How many entries are left after each map."""

    def add(self, name: str, gradient: Tensor) -> None:
        """Add one tensor's gradient of the present map."""
        half = self.half(gradient)
        mask = self.masks.setdefault(name, half)
        # In place: a mask is as large as the model's weights, a byte each.
        mask &= half

    def done(self) -> None:
        """Complete the present map."""
        self.counts.append(sum(int(mask.sum()) for mask in self.masks.values()))

    def settled(self, share: float) -> bool:
        """Tell whether the last `WINDOW` maps removed at most this share of the entries."""
        return settled(self.counts, share)


def settled(counts: Sequence[int], share: float) -> bool:
    """Tell whether the last `WINDOW` counts fell by at most a share of the one before them.

    >>> settled([1000, 500, *[400] * 10], 0.01), settled([1000, 500, *[499] * 9], 0.01)
    (False, False)
    >>> settled([1000, 500, *[499] * 10], 0.01)
    True
    """
    if len(counts) <= WINDOW:
        return False
    before = counts[-1 - WINDOW]
    return before - counts[-1] <= share * before


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool tensor into bits: uint8, an eighth of its length."""
    bits = mask.flatten().to(torch.uint8).cpu()
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).reshape(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack the bits of a tensor of this shape: the inverse of `pack_bits`."""
    each = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return each.flatten()[: torch.Size(shape).numel()].bool().reshape(tuple(shape))
