"""Frozen linear layers with their weights in 8 or 4 bits: a half or a quarter of bfloat16's memory.

They hold the numbers that `ops.quantisation` rounds a weight to, so that a model that is kept in a form
draws what the condition `quantisation` draws in the same form. Plain PyTorch on any device: no kernels
that compute in few bits, and so no gain in speed.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from expunge.ops.quantisation import BLOCK, restore_nf4, round_nf4, scale_rows


class FrozenLinear(nn.Module):
    """y = W x + b with a W that is no parameter and cannot be trained.

    The weight is made whole again in every call, in the dtype of the input: it takes the time of a copy,
    and gradients reach the input as through any linear layer.

    Args:
        linear: the layer that it takes the place of.
    """

    form: ClassVar[str]
    """The form's name."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features: int = linear.in_features
        self.out_features: int = linear.out_features
        self.store(linear.weight.detach())
        self.bias: nn.Parameter | None = linear.bias

    def store(self, weight: Tensor) -> None:
        """Keep a weight (out, in) as buffers: nothing that trains or counts parameters finds these."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, (out, in), float32."""
        raise NotImplementedError

    @staticmethod
    def count_bytes(out: int, width: int) -> int:
        """Count the bytes of a weight (out, width) in this form."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for x (…, in)."""
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


class Int8Linear(FrozenLinear):
    """8 bits, one scale a row, as `quantise_int8` rounds a weight."""

    form = "int8"
    rounded: Tensor
    """q, (out, in), int8."""
    scale: Tensor
    """s, (out, 1)."""

    def store(self, weight: Tensor) -> None:
        scale = scale_rows(weight.float())
        rounded = (weight.float() / scale).round_().clamp_(-127, 127)
        self.register_buffer("rounded", rounded.to(torch.int8))
        self.register_buffer("scale", scale)

    @property
    def weight(self) -> Tensor:
        return self.rounded.float() * self.scale.float()

    @staticmethod
    def count_bytes(out: int, width: int) -> int:
        return out * width + 4 * out


class NF4Linear(FrozenLinear):
    """NormalFloat-4 in blocks of 64 with one scale each, as `quantise_nf4` rounds a weight.

    Two levels share a byte; with the scales a weight takes 4.5 bits.
    """

    form = "nf4"
    packed: Tensor
    """Two levels a byte, (blocks, 32), uint8."""
    scale: Tensor
    """(blocks, 1), float32."""

    def store(self, weight: Tensor) -> None:
        levels, scale = round_nf4(weight)
        self.register_buffer("packed", levels[:, ::2] << 4 | levels[:, 1::2])
        self.register_buffer("scale", scale)

    @property
    def weight(self) -> Tensor:
        levels = torch.stack([self.packed >> 4, self.packed & 15], -1).flatten(1)
        shape = torch.Size((self.out_features, self.in_features))
        return restore_nf4(levels, self.scale.float(), shape)

    @staticmethod
    def count_bytes(out: int, width: int) -> int:
        return -(-out * width // BLOCK) * (BLOCK // 2 + 4)
