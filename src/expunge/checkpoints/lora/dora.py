"""DoRA: a LoRA whose weight's row or column norms are trained, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from expunge.changes import WeightChange


@dataclass(frozen=True, eq=False)
class Dora(WeightChange):
    """W + s (m ⊙ V / ‖V‖ − W) with V = W + up · down, and norms of V's rows or columns.

    It is applied to weights and never stored in an edit.

    Source: DoRA (Liu et al., ICML 2024, arXiv 2402.09353), as PEFT and LyCORIS train it.
    """

    kind: ClassVar[str] = "dora"
    up: Tensor
    """(out, rank)"""
    down: Tensor
    """(rank, in), or (rank, in · kernel height · kernel width)"""
    magnitude: Tensor
    """m, (out,) for norms of rows, (in,) for norms of columns."""
    of_rows: bool = True
    """Whether the norms are those of rows (PEFT) or of columns (LyCORIS's default)."""
    strength: float = 1.0
    """s, 0 for W and 1 for the trained weight."""

    def fits(self, shape: torch.Size) -> bool:
        """Return whether it can be applied to a weight of this shape."""
        rows, columns = shape[0], shape[1:].numel()
        norms = shape[0] if self.of_rows else shape[1]
        return (self.up.shape[0], self.down.shape[1], len(self.magnitude)) == (rows, columns, norms)

    def weight(self, original: Tensor) -> Tensor:
        """Return the weight in place of `original`, in its shape, dtype and device."""
        wide = torch.promote_types(original.dtype, torch.float32)
        up, down, magnitude = (t.to(original.device, wide) for t in (self.up, self.down, self.magnitude))
        base = original.to(wide)
        moved = base + (up @ down).reshape(base.shape)
        # One norm a row or column: a convolution's kernel counts with the other side.
        side = 0 if self.of_rows else 1
        # A row of zeros has no direction: it stays zero instead of becoming NaN.
        norms = moved.transpose(0, side).flatten(1).norm(dim=1).clamp_min(torch.finfo(wide).tiny)
        shape = [1] * moved.ndim
        shape[side] = -1
        trained = moved * (magnitude / norms).reshape(shape)
        return (base + self.strength * (trained - base)).to(original.dtype)
