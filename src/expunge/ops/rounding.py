"""Round to few bits, at random and right in the mean, and measure what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


def round_to(value: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Convert a tensor to another number format; below 16 bits, round up or down at random.

    Rounded to the nearest, a change smaller than half a step would vanish everywhere. At random, each
    way with a probability by how near it is, the mean of the change stays. Values beyond the format
    become its largest number.

    Args:
        value: the tensor.
        dtype: a floating-point format.
        generator: of the random numbers; formats of 16 bits and more draw none.
    """
    if dtype.itemsize > 1 or not dtype.is_floating_point:
        return value.to(dtype)
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    grid = every[every.isfinite()].unique(sorted=True)
    wide = value.detach().cpu().float().clamp(float(grid[0]), float(grid[-1]))
    # All 256 values of an 8-bit format fit in a table: neighbours are found by search.
    above = torch.bucketize(wide, grid, right=True).clamp(1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    draw = torch.rand(wide.shape, generator=generator)
    return torch.where(draw < (wide - low) / (high - low), high, low).to(dtype).to(value.device)


@dataclass
class RoundingCost:
    """What rounding does to changes, summed over tensors."""

    formats: set[str] = field(default_factory=set)
    missed: float = 0.0
    """Σ ‖rounded − wanted‖²"""
    along: float = 0.0
    """Σ ⟨rounded − original, Δ⟩"""
    total: float = 0.0
    """Σ ‖Δ‖²"""

    def add(self, original: Tensor, wanted: Tensor, written: Tensor) -> None:
        """Add a tensor.

        Args:
            original: before the change.
            wanted: after it, exactly.
            written: after it, rounded.
        """
        change = wanted.double() - original.double()
        self.missed += float((written.double() - wanted.double()).square().sum())
        self.along += float(((written.double() - original.double()) * change).sum())
        self.total += float(change.square().sum())
        self.formats.add(str(written.dtype).removeprefix("torch."))

    @property
    def error(self) -> float:
        """‖rounded − wanted‖ / ‖Δ‖"""
        return (self.missed / self.total) ** 0.5 if self.total else 0.0

    @property
    def kept(self) -> float:
        """The share of the changes that is left, along themselves: 1 is all."""
        return self.along / self.total if self.total else 1.0

    def note(self) -> str:
        """Say what rounding costs, in a sentence; "" where that is less than a thousandth."""
        if self.error < 1e-3:
            return ""
        return (
            f"Rounding to {' and '.join(sorted(self.formats))} keeps {self.kept:.1%} of the change and"
            f" adds noise of {self.error:.1%} of its norm."
        )
