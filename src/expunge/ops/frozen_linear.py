"""A frozen linear layer with its weight in 8 bits: half of the memory that it takes in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expunge.ops.quantisation import scale_rows


class Int8Linear(nn.Module):
    """y = (q s) x + b with an int8 q and one scale s a row, as `quantise_int8` rounds a weight.

    The weight is made whole again in every call, in the dtype of the input: it takes the time of a copy,
    and gradients reach the input as through any linear layer. It is no parameter and cannot be trained.

    Args:
        linear: the layer that it takes the place of.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features: int = linear.in_features
        self.out_features: int = linear.out_features
        scale = scale_rows(linear.weight.detach().float())
        rounded = (linear.weight.detach().float() / scale).round_().clamp_(-127, 127)
        # Buffers: nothing that trains or counts parameters may find them.
        self.register_buffer("rounded", rounded.to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias: nn.Parameter | None = linear.bias

    rounded: Tensor
    """q, (out, in), int8."""
    scale: Tensor
    """s, (out, 1)."""

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, (out, in), float32."""
        return self.rounded.float() * self.scale.float()

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for x (…, in)."""
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)
