"""Changes that are static weights: W · M, W + up · down, W with some entries moved, and another W."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from expunge.changes.contract import WeightChange


@dataclass(frozen=True, eq=False)
class Right(WeightChange):
    """W · M: the input is mapped by one matrix, shared by all layers of the change."""

    kind: ClassVar[str] = "right"
    matrix: Tensor
    """M, (in, in), where `in` is the width of the layers' input."""

    def fits(self, shape: torch.Size) -> bool:
        """Whether the layer's input is as wide as M."""
        return len(shape) == 2 and self.matrix.shape == (shape[1], shape[1])

    def weight(self, original: Tensor) -> Tensor:
        """Return W · M, (out, in)."""
        matrix = self.matrix.to(original.device)
        # In half precision the product would be rounded twice: once in M, once in the sum.
        wide = torch.promote_types(original.dtype, matrix.dtype)
        return (original.to(wide) @ matrix.to(wide)).to(original.dtype)


@dataclass(frozen=True, eq=False)
class LowRank(WeightChange):
    """W + up · down, for linear layers and, with the kernel flattened, for convolutions."""

    kind: ClassVar[str] = "low-rank"
    up: Tensor
    """(out, rank)"""
    down: Tensor
    """(rank, in), or (rank, in · kernel height · kernel width)"""

    def fits(self, shape: torch.Size) -> bool:
        """Whether up · down has as many rows and columns as the flattened weight."""
        rows, columns = shape[0], shape[1:].numel()
        return (self.up.shape[0], self.down.shape[1]) == (rows, columns)

    def weight(self, original: Tensor) -> Tensor:
        """Return W + up · down, in the shape of W."""
        # At least float32: the product of two small factors loses most in half precision.
        wide = torch.promote_types(torch.promote_types(original.dtype, self.up.dtype), torch.float32)
        up, down = (t.to(original.device, wide) for t in (self.up, self.down))
        return (original.to(wide) + (up @ down).reshape(original.shape)).to(original.dtype)


@dataclass(frozen=True, eq=False)
class Sparse(WeightChange):
    """W plus a difference at some of its entries."""

    kind: ClassVar[str] = "sparse"
    index: Tensor
    """(n,), int64 or int32: the entries' positions in the flattened parameter."""
    difference: Tensor
    """(n,): what is added to each."""

    def fits(self, shape: torch.Size) -> bool:
        """Whether every position lies inside the parameter."""
        inside = (self.index >= 0) & (self.index < shape.numel())
        return self.index.shape == self.difference.shape and bool(inside.all())

    def weight(self, original: Tensor) -> Tensor:
        """Return W with the differences added."""
        # Files may store int32, half the size; `index_add` wants int64 on some devices.
        index = self.index.to(original.device, torch.int64)
        difference = self.difference.to(original.device, original.dtype)
        return original.flatten().index_add(0, index, difference).reshape(original.shape)


@dataclass(frozen=True, eq=False)
class Dense(WeightChange):
    """Another parameter in place of W."""

    kind: ClassVar[str] = "dense"
    value: Tensor
    """The parameter's new value."""

    def fits(self, shape: torch.Size) -> bool:
        """Whether the new value has the parameter's shape."""
        return self.value.shape == shape

    def weight(self, original: Tensor) -> Tensor:
        """Return the new value in the dtype and on the device of W."""
        return self.value.to(original.device, original.dtype)
