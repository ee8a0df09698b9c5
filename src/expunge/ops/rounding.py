"""Stochastic rounding to eight bits, and what rounding costs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

NEGLIGIBLE = 1e-5
"""The share of a step between two numbers of a format below which a difference counts as none."""


def round_stochastically(value: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Convert a tensor to another dtype; below 16 bits round up or down at random.

    The nearer number is the likelier, so that the mean over many entries is kept. To the nearest, a
    change smaller than half a step would vanish everywhere. Values beyond the format become its
    largest number, and numbers of the format stay.

    Args:
        value: the tensor, of any shape.
        dtype: the dtype to convert to; 16 bits and more are rounded to the nearest.
        generator: of the random numbers, one for each entry; none where nothing is rounded at random.
    """
    if dtype.itemsize > 1 or not dtype.is_floating_point:
        return value.to(dtype)
    # Eight bits have 256 numbers, so that the format itself is the table of neighbours.
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    grid = every[every.isfinite()].unique(sorted=True)
    wide = value.detach().cpu().float().clamp(float(grid[0]), float(grid[-1]))
    # A value on the grid is its own lower neighbour; the largest alone is its own upper one.
    above = torch.bucketize(wide, grid, right=True).clamp(1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    share = (wide - low) / (high - low)
    # A scaled weight that is unscaled and scaled again misses its number by float32's rounding.
    share = torch.where(share < NEGLIGIBLE, 0.0, torch.where(share > 1 - NEGLIGIBLE, 1.0, share))
    draw = torch.rand(wide.shape, generator=generator)
    return torch.where(draw < share, high, low).to(dtype).to(value.device)


@dataclass
class RoundingCost:
    """What rounding does to changes of weights, added up over tensors."""

    formats: set[str] = field(default_factory=set)
    """The dtypes that were rounded to."""
    missed: float = 0.0
    """Σ ‖rounded − wanted‖²"""
    along: float = 0.0
    """Σ ⟨rounded − original, Δ⟩"""
    total: float = 0.0
    """Σ ‖Δ‖²"""

    def add(
        self, original: Tensor, wanted: Tensor, written: Tensor, dtype: torch.dtype | None = None
    ) -> None:
        """Add one tensor.

        Args:
            original: before the change.
            wanted: after the change, before rounding.
            written: after rounding.
            dtype: what was rounded to; by default the dtype of `written`, which a scaled tensor hides.
        """
        change = wanted.double() - original.double()
        self.missed += float((written.double() - wanted.double()).square().sum())
        self.along += float(((written.double() - original.double()) * change).sum())
        self.total += float(change.square().sum())
        self.formats.add(str(dtype or written.dtype).removeprefix("torch."))

    @property
    def error(self) -> float:
        """The relative error ‖rounded − wanted‖ / ‖Δ‖."""
        return (self.missed / self.total) ** 0.5 if self.total else 0.0

    @property
    def kept(self) -> float:
        """The component of the rounded changes along the wanted ones, as a share: 1 is all."""
        return self.along / self.total if self.total else 1.0

    def describe(self) -> str:
        """Describe the cost in a sentence; "" where the error is below a thousandth."""
        if self.error < 1e-3:
            return ""
        return (
            f"Rounding to {' and '.join(sorted(self.formats))} keeps {self.kept:.1%} of the change and"
            f" adds noise of {self.error:.1%} of its norm."
        )
